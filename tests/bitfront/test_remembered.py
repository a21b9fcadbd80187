"""Fronts in memory: read once, again when their job's record is newer, by one of many at a time."""

import sys
import threading
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from filling import Size, fill

from bitfront import remembered
from bitfront.remembered import Fronts
from store.database import Store
from store.queries import update_job


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    opened = Store(f"sqlite:///{tmp_path_factory.mktemp('fronts')}/s.sqlite").open()
    fill(opened, Size(models=1, jobs=1, measurements=0, layers=2))
    return opened


@pytest.fixture
def reads(monkeypatch):
    """How often a front was read."""
    found = []
    real = remembered.load_front

    def counted(store, job):
        found.append(job.id)
        return real(store, job)

    monkeypatch.setattr(remembered, "load_front", counted)
    return found


def test_many_who_ask_at_once_wait_for_one_reading(store, reads):
    fronts, gate = Fronts(store), threading.Barrier(8)
    points = []

    def ask():
        gate.wait()
        points.append(len(fronts.get(1).points))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (reads, points) == ([1], [18] * 8)


def test_a_changed_record_is_read_again(store, reads):
    fronts = Fronts(store)
    assert fronts.get(1) is fronts.get(1)
    update_job(store, 1, facts={"noise_floor": 0.5})
    assert fronts.get(1).job.facts["noise_floor"] == 0.5
    assert reads == [1, 1]
