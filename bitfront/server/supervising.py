"""The supervisor: sees to it that what was submitted has a driver, whatever dies.

It keeps nothing in memory that matters. Who drives what is in the store's claims, so several servers
may share a store, and one that comes back finds everything as it is.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from quantization.errors import BitfrontError, WorkerError
from store.claims import EXPORT, JOB, claim, held, let_go, new_owner, settle
from store.database import Store
from store.errors import StoreError
from store.queries import find_job, update_job
from store.submissions import FAILED, attempt, open_exports, open_jobs
from store.tables import ExportOrder, Job
from workers.launching import STORE, Launcher

LOOK_S = 1.0
LAUNCH_S = 90.0
"""How long a driver may take to begin, before it is given up."""
AGAIN_S = 10.0
"""And after which a cluster that is away is asked again."""
MOST_ATTEMPTS = 3
KINDS: dict[str, tuple[type[Job] | type[ExportOrder], str]] = {
    JOB: (Job, "drive"),
    EXPORT: (ExportOrder, "drive-export"),
}
logger = logging.getLogger("bitfront")


class Supervisor:
    """Starts drivers in a thread of its own.

    Args:
        store: where jobs and claims are.
        launcher: starts them.
        most: drivers at the same time.
        arguments: of all drivers, after the command and the number.
        environment: of all drivers.
        check: refuses configurations that aren't for a server: what is submitted to the store
            itself has passed no route.
    """

    def __init__(
        self,
        store: Store,
        launcher: Launcher,
        most: int,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        check: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self._check = check
        self._store, self._launcher, self._most = store, launcher, most
        self._arguments = list(arguments)
        self._environment = {STORE: store.url, **(environment or {})}
        self._owner = new_owner()
        self._launched: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Begin to look after jobs."""
        self._thread.start()

    def stop(self) -> None:
        """Start no more drivers."""
        self._stop.set()
        self._thread.join(timeout=10)

    def look(self) -> None:
        """Start what is missing, once."""
        self._launcher.reap()
        busy = {prefix: held(self._store, prefix) for prefix in KINDS}
        launching = held(self._store, "launch:")
        running = sum(map(len, busy.values()))
        for key in self._missing(busy):
            launch = f"launch:{key}"
            if launch in launching and not self._has_failed(key):
                running += 1  # it is on its way
                continue
            if running >= self._most:
                return
            if self._begin(key, launch):
                running += 1

    def _missing(self, busy: dict[str, dict[str, str]]) -> Iterator[str]:
        """Claims of drivers that there should be and that nobody holds."""
        # exports first: they are short, and jobs may be many
        wanted = {EXPORT: open_exports(self._store), JOB: open_jobs(self._store)}
        for prefix, numbers in wanted.items():
            for number in numbers:
                if (key := f"{prefix}{number}") not in busy[prefix]:
                    yield key

    def _has_failed(self, key: str) -> bool:
        """Whether the driver that we started is known to have ended without a claim."""
        return key in self._launched and self._launcher.ended(_name(key))

    def _begin(self, key: str, launch: str) -> bool:
        if self._has_failed(key):
            settle(self._store, self._owner, [launch])
        if not claim(self._store, self._owner, [launch], LAUNCH_S):
            return False  # another server is at it
        prefix, _, number = key.partition(":")
        kind, command = KINDS[f"{prefix}:"]
        if not attempt(self._store, kind, int(number), MOST_ATTEMPTS):
            settle(self._store, self._owner, [launch])
            return False
        if not self._is_ours(key, int(number)):
            return False
        logger.info("starting the driver of %s", key)
        address = ["--address", self._launcher.address]
        try:
            self._launcher.start(
                _name(key), [command, number, *address, *self._arguments], self._environment
            )
        except WorkerError as error:
            logger.warning("%s: %s", key, error)
            attempt(self._store, kind, int(number), MOST_ATTEMPTS, -1)  # nobody has died of it
            claim(self._store, self._owner, [launch], AGAIN_S)
            return False
        self._launched[key] = time.monotonic()
        return True

    def _is_ours(self, key: str, number: int) -> bool:
        """Whether a server may run it; a job that it may not run fails."""
        if not key.startswith(JOB):
            return True
        try:
            self._check(find_job(self._store, number).config)
        except BitfrontError as error:
            update_job(self._store, number, state=FAILED, error=str(error))
            return False
        return True

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                self.look()
            except StoreError as error:
                logger.warning("%s", error)
            except Exception:  # a supervisor that dies silently would be worse
                logger.exception("the supervisor failed, and goes on")
        with suppress(StoreError):  # launches run out by themselves
            let_go(self._store, self._owner)


def _name(key: str) -> str:
    return key.replace(":", "-")
