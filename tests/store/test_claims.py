"""Claims: one holder at a time, taken over from the dead, late results recognised."""

import os
import subprocess
import sys
import threading
import time

import pytest

from store.claims import claim, held, holders, is_dead, let_go, new_owner, renew, settle
from store.database import Store

KEYS = [f"{i:064d}" for i in range(1200)]
ELSEWHERE = "another-machine/1/00"


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, tmp_path):
    """The same contract holds for both."""
    if request.param == "sqlite":
        return Store(f"sqlite:///{tmp_path}/store.sqlite").open()
    return Store(request.getfixturevalue("postgres_url")).open()


def test_a_key_has_one_holder(store):
    ours, theirs = new_owner(), ELSEWHERE
    assert claim(store, ours, KEYS[:3]) == set(KEYS[:3])
    assert claim(store, theirs, KEYS[:4]) == {KEYS[3]}
    assert holders(store, KEYS[:5]) == {**dict.fromkeys(KEYS[:3], ours), KEYS[3]: theirs}


def test_many_keys_are_claimed_at_once(store):
    assert claim(store, new_owner(), KEYS) == set(KEYS)
    assert claim(store, ELSEWHERE, KEYS) == set()


def test_a_key_that_is_asked_for_twice_is_claimed_once(store):
    owner = new_owner()
    assert claim(store, owner, [KEYS[0], KEYS[0], KEYS[1]]) == set(KEYS[:2])


def test_claims_expire_unless_renewed_and_late_results_are_recognised(store):
    first, second = "machine-a/1/00", "machine-b/1/00"
    claim(store, first, KEYS[:2], lease_s=0.3)
    assert claim(store, second, KEYS[:1]) == set()
    renew(store, first, lease_s=0.6)
    time.sleep(0.35)
    assert claim(store, second, KEYS[:1]) == set()  # renewed
    time.sleep(0.4)
    assert holders(store, KEYS[:2]) == {}
    assert claim(store, second, KEYS[:1]) == {KEYS[0]}
    # the first one's work on the taken key is late, on the other it isn't
    assert settle(store, first, KEYS[:2]) == {KEYS[0]}
    assert settle(store, second, KEYS[:1]) == set()
    assert claim(store, first, KEYS[:2]) == set(KEYS[:2])


def test_what_the_dead_held_is_free_at_once(store):
    dead = _owner_of_a_dead_process()
    assert is_dead(dead)
    assert not is_dead(new_owner())
    assert not is_dead(ELSEWHERE)
    assert claim(store, dead, [*KEYS[:5], "job:1"]) == {*KEYS[:5], "job:1"}
    assert held(store, "job:") == {}
    assert claim(store, ELSEWHERE, KEYS[:5]) == set(KEYS[:5])


def test_letting_go_frees_everything(store):
    claim(store, ELSEWHERE, KEYS[:9])
    let_go(store, ELSEWHERE)
    assert claim(store, new_owner(), KEYS[:9]) == set(KEYS[:9])


def test_of_many_at_once_one_gets_it(store):
    """Threads with stores of their own race for overlapping keys: no key has two winners."""
    won: dict[str, list[int]] = {}
    gate = threading.Barrier(6)

    def race(number):
        own = Store(store.url)
        gate.wait()
        for start in range(0, 60, 10):
            for key in claim(own, f"m{number}/1/00", KEYS[start : start + 20]):
                won.setdefault(key, []).append(number)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(won) == set(KEYS[:70])
    assert all(len(set(numbers)) == 1 for numbers in won.values())


def _owner_of_a_dead_process():
    code = "from store.claims import new_owner; print(new_owner())"
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ
    )
    return found.stdout.strip()
