"""The bank's progress: it moves while the bank grows, and ends where the bank is whole."""

from contextlib import contextmanager

import pytest

from bitfront import preparing
from bitfront.pipeline import spec_of
from bitfront.plan import make_plan
from quantization.errors import BankError
from tests.bitfront.test_pipeline import small_config
from workers.pool import InProcessPool


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
    assert first.told[0] == 0  # the statistics
    assert len([done for done in first.told if done > 0]) > 5
    assert sum(first.told) == 100
    preparing.prepare(InProcessPool(spec), again)
    assert again.told == [100]


def test_a_disk_that_fills_up_on_the_way_ends_it(spec, monkeypatch):
    monkeypatch.setattr(preparing, "SLICE_S", 0)
    whole, told = "quantization.bank.Bank._write_entry", Told()
    pool = InProcessPool(spec)
    monkeypatch.setattr(whole, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(BankError, match="No space left"):
        preparing.prepare(pool, told)
    assert sum(told.told) < 100
