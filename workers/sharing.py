"""Drivers that share what they measure: a task that another one is at is waited for, not repeated.

Tasks with a key are claimed in the store shortly before a worker gets them. What another driver
holds is put aside: it comes back as an outcome without a value once the store has the result, or is
taken over when that driver's lease has run out.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from store.claims import LEASE_S, RENEWALS, claim, holders, renew, settle
from store.database import Store
from store.errors import StoreError
from store.queries import known_keys
from workers.pool import Outcome, Pool, Task

AHEAD = 2
"""Tasks that are claimed for each worker, one of which it is at."""
POLL_S = 0.3

Late = Callable[[set[str]], None]


class SharingPool(Pool):
    """A pool whose tasks are claimed.

    Args:
        pool: does the work.
        store: where claims and results are; callers save a result before they ask for the next.
        owner: of the claims, which somebody renews (`renewed`).
        late: told which results came after somebody else had taken their task over.
    """

    def __init__(self, pool: Pool, store: Store, owner: str, late: Late = lambda _: None) -> None:
        self._pool, self._store, self._owner, self._late = pool, store, owner, late
        self._waiting: deque[Task] = deque()
        self._elsewhere: list[Task] = []
        self._known: deque[Task] = deque()
        self._claimed: set[str] = set()
        self._handled: list[str] = []
        self._inside = 0

    @property
    def workers(self) -> int:  # type: ignore[override]  # it may grow and shrink
        """See `Pool.workers`."""
        return self._pool.workers

    def submit(self, task: Task) -> None:
        """See `Pool.submit`."""
        if task.key is None:
            self._pool.submit(task)
            self._inside += 1
        else:
            self._waiting.append(task)

    def next(self) -> Outcome:
        """See `Pool.next`; outcomes that are known have no value, and their result is stored.

        Claims on what has been saved are let go with the next ones that are made, or at the end.
        """
        while True:
            self._feed()
            if self._known:
                return Outcome(self._known.popleft(), known=True)
            if not self._waiting:
                self._settle()
            if self._inside:
                outcome = self._pool.next()
                self._inside -= 1
                if outcome.task.key is not None:
                    self._handled.append(outcome.task.key)
                return outcome
            if not self._elsewhere:
                raise LookupError("no task is queued")
            time.sleep(POLL_S)
            self._look_elsewhere()

    def drop(self) -> None:
        """See `Pool.drop`."""
        self._waiting.clear()
        self._elsewhere.clear()
        self._known.clear()
        self._pool.drop()
        self._inside = 0
        self._handled = list(self._claimed)
        self._settle()

    def close(self) -> None:
        """See `Pool.close`."""
        self._pool.close()
        self._handled = list(self._claimed)
        with suppress(StoreError):  # a lease runs out by itself
            self._settle()

    @contextmanager
    def exclusively(self, key: str) -> Iterator[None]:
        """See `Pool.exclusively`; waits until whoever is at it ends, or its lease does."""
        while not claim(self._store, self._owner, [key]):
            time.sleep(POLL_S)
        try:
            yield
        finally:
            with suppress(StoreError):
                settle(self._store, self._owner, [key])

    def _settle(self) -> None:
        """Let the claims go whose results have been saved."""
        if not self._handled:
            return
        keys, self._handled = self._handled, []
        self._claimed.difference_update(keys)
        if late := settle(self._store, self._owner, keys):
            self._late(late)

    def _feed(self) -> None:
        """Claim the next tasks and hand them to workers, half of them at a time."""
        most = AHEAD * self._pool.workers
        while self._waiting and self._inside < most - self._pool.workers // 2:
            tasks = [
                self._waiting.popleft() for _ in range(min(most - self._inside, len(self._waiting)))
            ]
            self._settle()
            mine = claim(self._store, self._owner, [str(task.key) for task in tasks])
            there = _known(self._store, [task for task in tasks if task.key in mine])
            self._claimed |= mine
            if done := mine & there:
                self._handled.extend(done)
                self._settle()
            for task in tasks:
                if task.key in there:
                    self._known.append(task)
                elif task.key in mine:
                    self._pool.submit(task)
                    self._inside += 1
                else:
                    self._elsewhere.append(task)

    def _look_elsewhere(self) -> None:
        """What others have finished is known, what they have let go is ours to do."""
        there = _known(self._store, self._elsewhere)
        busy = holders(self._store, [str(task.key) for task in self._elsewhere])
        tasks, self._elsewhere = self._elsewhere, []
        for task in tasks:
            if task.key in there:
                self._known.append(task)
            elif task.key in busy:
                self._elsewhere.append(task)
            else:
                self._waiting.append(task)


def _known(store: Store, tasks: Sequence[Task]) -> set[str]:
    """The keys of those tasks whose results are stored."""
    found: set[str] = set()
    for table in {task.table for task in tasks if task.table is not None}:
        keys = [str(task.key) for task in tasks if task.table is table]
        found |= known_keys(store, table, keys)
    return found


@contextmanager
def renewed(
    store: Store, owner: str, each: Callable[[], None] = lambda: None, every_s: float | None = None
) -> Iterator[None]:
    """While an owner's claims are renewed by a thread of their own.

    Args:
        store: where the claims are.
        owner: whose.
        each: done after each renewal, in that thread.
        every_s: how often `each` is done, if oftener than claims need it.
    """
    stop = threading.Event()
    between = LEASE_S / RENEWALS
    pause = min(between, every_s or between)

    def keep() -> None:
        renewed_at = time.monotonic()
        while not stop.wait(pause):
            with suppress(StoreError):  # it is away: claims last a while, and it is asked again
                if time.monotonic() - renewed_at >= between:
                    renew(store, owner)
                    renewed_at = time.monotonic()
                each()

    thread = threading.Thread(target=keep, name="renewing claims", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)
