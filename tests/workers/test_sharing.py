"""Drivers that share a store: no task is done twice, dead drivers' tasks are taken over."""

import threading
import time
from collections import deque

import pytest

from quantization.errors import MeasurementError
from store.claims import claim, new_owner, renew
from store.database import Store
from store.queries import known_keys, save_measurement
from store.tables import Measurement
from workers.pool import InProcessPool, Outcome, Task
from workers.ray_pool import Needs, RayPool
from workers.sharing import SharingPool, renewed

OTHER = "another-machine/1/00"
KEYS = [f"key-{i}" for i in range(12)]


class Counter:
    """The work: says which key was done, and counts."""

    def __init__(self):
        self.done: list[str] = []

    def measure(self, key):
        self.done.append(key)
        time.sleep(0.01)
        if key == "bad":
            raise MeasurementError("no")
        return key

    def close(self):
        """Nothing is held."""


class CountingPool(InProcessPool):
    def __init__(self, counter, workers=1):
        self._session, self._queue = counter, deque()
        self.workers = workers


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/s.sqlite"
    return request.getfixturevalue("postgres_url")


def tasks(keys=KEYS):
    return [Task("measure", {"key": key}, key=key, table=Measurement) for key in keys]


def save(store, key):
    row = Measurement(
        key=key, weights_hash="w", map_hash="m", chunk_hash="c", quantizer="q", dtype="d",
        kl_sum=1.0, nll_sum=1.0, tokens=1, seconds=0.1,
    )  # fmt: skip
    save_measurement(store, row)


def drive(store, counter, owner, keys=KEYS):
    """What every caller does: save a value, read what is known."""
    with SharingPool(CountingPool(counter), store, owner) as pool:
        outcomes = []
        for outcome in pool.run(tasks(keys)):
            if not outcome.known and not outcome.error:
                save(store, outcome.task.key)
            outcomes.append(outcome)
    return outcomes


def test_two_drivers_at_once_do_everything_once(url):
    Store(url).open()
    counters, found = [Counter(), Counter()], []

    def run(counter):
        found.append(drive(Store(url), counter, new_owner()))

    threads = [threading.Thread(target=run, args=(counter,)) for counter in counters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counters[0].done + counters[1].done) == sorted(KEYS)
    assert all(counter.done for counter in counters)
    for outcomes in found:
        assert sorted(outcome.task.key for outcome in outcomes) == sorted(KEYS)
    assert known_keys(Store(url), Measurement, KEYS) == set(KEYS)


def test_what_another_holds_is_waited_for_and_read(url):
    store, counter = Store(url).open(), Counter()
    claim(store, OTHER, KEYS[:2])

    def finish():
        time.sleep(0.5)
        for key in KEYS[:2]:
            save(Store(url), key)

    other = threading.Thread(target=finish)
    other.start()
    outcomes = drive(store, counter, new_owner())
    other.join()
    assert sorted(counter.done) == sorted(KEYS[2:])
    assert {o.task.key for o in outcomes if o.known} == set(KEYS[:2])


def test_a_dead_drivers_task_is_taken_over_and_its_late_result_is_recognised(url):
    store, counter = Store(url).open(), Counter()
    claim(store, OTHER, KEYS[:1], lease_s=0.5)
    assert len(drive(store, counter, new_owner(), KEYS[:3])) == 3
    assert sorted(counter.done) == KEYS[:3]
    told: list[set[str]] = []
    late = SharingPool(CountingPool(Counter()), store, OTHER, told.append)
    late._claimed, late._handled = {KEYS[0]}, [KEYS[0]]  # as if it woke up now
    save(store, KEYS[0])
    late._settle()
    assert told == [{KEYS[0]}]
    assert known_keys(store, Measurement, KEYS) == set(KEYS[:3])


def test_errors_of_the_work_let_the_claim_go(url):
    store = Store(url).open()
    first, second = Counter(), Counter()
    [outcome] = drive(store, first, new_owner(), ["bad"])
    assert isinstance(outcome.error, MeasurementError)
    [outcome] = drive(store, second, new_owner(), ["bad"])
    assert second.done == ["bad"]


def test_a_pool_that_is_left_early_holds_nothing(url):
    store = Store(url).open()
    with SharingPool(CountingPool(Counter(), workers=4), store, new_owner()) as pool:
        for task in tasks():
            pool.submit(task)
        assert isinstance(pool.next(), Outcome)
    assert claim(store, OTHER, KEYS) == set(KEYS)


def test_renewed_claims_outlast_their_lease(url, monkeypatch):
    store, owner = Store(url).open(), new_owner()
    monkeypatch.setattr("workers.sharing.LEASE_S", 0.8)
    monkeypatch.setattr("workers.sharing.renew", lambda s, o: renew(s, o, 0.8))
    claim(store, "elsewhere/1/00", KEYS[:1], lease_s=0.8)
    claim(store, owner, KEYS[1:2], lease_s=0.8)
    with renewed(store, owner):
        time.sleep(1.6)
        assert claim(store, OTHER, KEYS[:2]) == {KEYS[0]}


def test_one_driver_at_a_time_in_an_exclusive_section(url):
    store = Store(url).open()
    inside, most = 0, []

    def enter(number):
        nonlocal inside
        pool = SharingPool(CountingPool(Counter()), Store(url), f"m{number}/1/00")
        with pool.exclusively("timing:here"):
            inside += 1
            most.append(inside)
            time.sleep(0.1)
            inside -= 1

    threads = [threading.Thread(target=enter, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
    assert store is not None


class Sleeper:
    """The work of workers that share a cluster."""

    def __init__(self, spec):
        self.spec = spec

    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds


def test_a_pool_shrinks_and_grows_with_its_share(monkeypatch):
    """Half of two workers is one; when the other job has ended, it is two again."""
    monkeypatch.setattr("workers.ray_pool.SHARE_S", 0.2)
    part = 1.0
    with RayPool(None, needs=Needs(2), share=lambda: part, make=Sleeper) as pool:
        counts = []
        for wanted in (1.0, 0.5, 1.0):
            part = wanted
            for outcome in pool.run(Task("sleep", {"seconds": 0.1}) for _ in range(12)):
                assert outcome.value == 0.1
            counts.append((pool.workers, len(pool._actors)))
    assert counts == [(2, 2), (1, 1), (2, 2)]
