"""The bank's progress: it moves while the bank grows, and ends where the bank is whole."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from bitfront import preparing
from bitfront.pipeline import spec_of
from bitfront.plan import make_plan
from quantization.bank import Bank
from quantization.errors import BankError
from tests.bitfront.test_pipeline import small_config
from workers.pool import InProcessPool, make_session
from workers.ray_pool import Needs, RayPool

ROOM = 20


class Told:
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def expect(self, work):
        """Nothing to keep."""

    @contextmanager
    def stage(self, label, steps, weight=1):
        assert (label, steps) == (preparing.BANK, 100)
        yield self.told.append


@pytest.fixture
def spec(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("BITFRONT_CACHE", str(tmp_path))
    plan = make_plan(small_config(tiny_folders("llama"), quantizer="gptq"))
    return spec_of(plan, str(tmp_path))


def test_a_bank_grows_before_ones_eyes(spec, monkeypatch):
    monkeypatch.setattr(preparing, "SLICE_S", 0)
    first, again = Told(), Told()
    preparing.prepare(InProcessPool(spec), first)
    assert len(first.told) > 5
    assert min(first.told) > 0
    assert sum(first.told) == 100
    preparing.prepare(InProcessPool(spec), again)
    assert again.told == [100]


def test_a_disk_that_fills_up_on_the_way_ends_it(spec, monkeypatch):
    monkeypatch.setattr(preparing, "SLICE_S", 0)
    write, written = Bank._write_entry, []

    def until_full(bank, *entry):
        written.append(entry)
        if len(written) > ROOM:
            raise OSError(28, "No space left")
        write(bank, *entry)

    told, later = Told(), Told()
    with monkeypatch.context() as full, InProcessPool(spec) as pool:
        full.setattr(Bank, "_write_entry", until_full)
        with pytest.raises(BankError, match="No space left"):
            preparing.prepare(pool, told)
    assert 0 < sum(told.told) < 100
    with InProcessPool(spec) as pool:
        preparing.prepare(pool, later)  # nobody holds the lock
    assert sum(later.told) == 100
    assert len(later.told) < len(told.told) + ROOM


def test_a_bank_that_another_worker_builds_is_waited_for(spec):
    """And what that one has built isn't built again."""
    first, second = make_session(spec), make_session(spec)
    lacked, left = first.prepare(0)
    assert 0 < left <= lacked
    assert second.prepare(0) == (1, 1)
    while left:
        _, left = first.prepare(0)
    assert second.prepare(0) in {(1, 1), (1, 0)}  # it looks again after a while
    assert second.prepare() == (1, 0)


def test_a_bank_that_only_grows_is_let_go_at_its_end(spec):
    """Its last file may be the last step's: the lock must be free then."""
    narrow = replace(spec, choices=tuple(row[:2] for row in spec.choices))
    make_session(narrow).prepare()
    session, left = make_session(spec), 1
    while left:
        _, left = session.prepare(0)
    assert make_session(spec).prepare(0) == (1, 0)


def test_workers_of_a_cluster_build_one_bank(spec):
    told = Told()
    with RayPool(spec, "local", Needs(2)) as pool:
        preparing.prepare(pool, told)
    assert min(told.told) > 0
    assert sum(told.told) == 100
