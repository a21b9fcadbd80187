"""Fronts in memory: what a job's points are changes only with its record, so it is read once."""

import threading
import time
from collections import OrderedDict
from datetime import datetime

from bitfront.fronts import Front, load_front
from store.database import Store
from store.queries import find_job
from store.submissions import job_stamp

MOST = 512
FRESH_S = 2.0
"""How long the front of a job that runs is taken for new."""


class Fronts:
    """Fronts by job, each read again when its job's record is newer. Threads may share it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: OrderedDict[int, tuple[datetime, float, Front]] = OrderedDict()
        self._reading: dict[int, threading.Lock] = {}

    def get(self, job_id: int) -> Front:
        """The front of a job; raises `NotFoundError` where there is none."""
        changed, is_running = job_stamp(self._store, job_id)
        return self.at(job_id, changed, is_running=is_running)

    def at(self, job_id: int, changed: datetime, *, is_running: bool = False) -> Front:
        """The front of a job whose record was changed then."""
        if front := self._find(job_id, changed, is_running=is_running):
            return front
        with self._lock:
            reading = self._reading.setdefault(job_id, threading.Lock())
        with reading:  # who comes meanwhile waits for what this one reads
            front = self._find(job_id, changed, is_running=is_running)
            return front or self._read(job_id, changed)

    def _find(self, job_id: int, changed: datetime, *, is_running: bool) -> Front | None:
        with self._lock:
            known = self._known.get(job_id)
            if known is None:
                return None
            self._known.move_to_end(job_id)
        if is_running:  # a shell's job is changed between stages only
            return known[2] if time.monotonic() - known[1] < FRESH_S else None
        return known[2] if known[0] == changed else None

    def _read(self, job_id: int, changed: datetime) -> Front:
        front = load_front(self._store, find_job(self._store, job_id))
        with self._lock:
            self._known[job_id] = changed, time.monotonic(), front
            while len(self._known) > MOST:
                gone, _ = self._known.popitem(last=False)
                self._reading.pop(gone, None)
        return front
