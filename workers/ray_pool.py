"""Workers as Ray actors: on this machine, or on a cluster.

Each actor holds one replica and works on one task at a time; free actors take the next task in
the queue, so a slow one delays nobody. Ray restarts an actor that died (killed, out of memory),
and its task goes back to the front of the queue.
"""

import logging
import os
import time
from collections import deque
from dataclasses import replace
from math import inf
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from quantization.errors import BitfrontError, WorkerDiedError, WorkerError
from workers.pool import Outcome, Pool, Task, call
from workers.session import Session, SessionSpec

LOCAL = "local"
MOST_LOCAL_WORKERS = 8
ATTEMPTS = 3
RESTART_PATIENCE_S = 120
START_PATIENCE_S = 300
OBJECT_STORE_BYTES = 128 * 2**20  # tasks and results are small; weights travel by the page cache


class _Worker:
    """The actor."""

    def __init__(self, spec: SessionSpec) -> None:
        self._session = Session(spec)

    def run(self, method: str, arguments: dict[str, Any]) -> Any:
        """Call a method of the session; its errors are values, Ray's are exceptions."""
        try:
            return call(self._session, method, arguments), None
        except BitfrontError as error:
            return None, error

    def process(self) -> int:
        """The process number: answers once the actor lives."""
        return os.getpid()


class RayPool(Pool):
    """A pool of actors.

    Args:
        spec: what each worker needs; `threads` is overruled by what a worker's share of cores is.
        address: a Ray cluster's address, or `local` for a Ray of our own.
        workers: how many actors; by default one a GPU, or up to eight a machine.
    """

    def __init__(self, spec: SessionSpec, address: str = LOCAL, workers: int | None = None) -> None:
        _connect(address)
        resources = ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)), max(int(resources.get("CPU", 1)), 1)
        machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        self.workers = workers or gpus or min(cores, MOST_LOCAL_WORKERS * max(len(machines), 1))
        largest = int(max(machines, default=1)) or 1
        threads = max(min(cores // self.workers, largest), 1)
        options = {
            "num_cpus": min(threads, cores / self.workers),
            "num_gpus": min(1, gpus / self.workers),
            "max_restarts": -1,
        }
        actor = ray.remote(_Worker).options(**options)
        self._actors = [actor.remote(replace(spec, threads=threads)) for _ in range(self.workers)]
        self._await_actors()
        # a GPU has one worker, and its memory to itself
        self._memory_bytes = inf if gpus else resources.get("memory", inf)
        self._idle = deque(self._actors)
        self._queue: deque[tuple[Task, int]] = deque()
        self._running: dict[Any, tuple[Any, Task, int]] = {}

    def _await_actors(self) -> None:
        """Wait until all actors run; a cluster without room for them would hang silently."""
        try:
            ray.get([actor.process.remote() for actor in self._actors], timeout=START_PATIENCE_S)
        except RayError as error:
            raise WorkerError(
                f"{self.workers} workers did not start within {START_PATIENCE_S} s on a cluster of "
                f"{ray.cluster_resources().get('CPU', 0):g} CPUs and "
                f"{ray.cluster_resources().get('GPU', 0):g} GPUs "
                f"({_line(error)}); "
                "try fewer with --workers"
            ) from error

    def submit(self, task: Task) -> None:
        """See `Pool.submit`."""
        self._queue.append((task, 1))
        self._dispatch()

    def next(self) -> Outcome:
        """See `Pool.next`."""
        while True:
            if not self._running:
                raise LookupError("no task is queued")
            [reference], _ = ray.wait(list(self._running), num_returns=1)
            actor, task, attempt = self._running.pop(reference)
            try:
                value, error = ray.get(reference)
            except RayTaskError:  # a bug in the task, which another worker would repeat
                raise
            except RayError as failure:
                self._idle.append(actor)
                self._retry(task, attempt, failure)
                continue
            self._idle.append(actor)
            self._dispatch()
            return Outcome(task, value, error)

    def processes(self) -> list[int]:
        """The workers' process numbers."""
        return [_process(actor) for actor in self._actors]

    def drop(self) -> None:
        """See `Pool.drop`."""
        self._queue.clear()
        while self._running:
            self.next()

    def close(self) -> None:
        """See `Pool.close`."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        ray.shutdown()

    def _retry(self, task: Task, attempt: int, failure: RayError) -> None:
        """Queue a task again, once Ray has restarted its worker.

        Whatever killed that one may have killed idle ones too: a task that were sent to them
        would lose an attempt that was never made. The others work on meanwhile.
        """
        for actor in self._idle:
            _process(actor)
        if attempt < ATTEMPTS:
            self._queue.appendleft((task, attempt + 1))
        self._dispatch()
        if attempt >= ATTEMPTS:
            raise WorkerDiedError(
                f"a worker died {ATTEMPTS} times in '{task.method}' "
                f"({_line(failure)}); what was measured is kept: "
                "try fewer workers (--workers), it may be out of memory"
            ) from failure

    def _dispatch(self) -> None:
        """Start what there are workers and, by the tasks' forecasts, memory for; one task always."""
        while self._queue and self._idle:
            running = sum(task.memory_bytes for _, task, _ in self._running.values())
            if self._running and running + self._queue[0][0].memory_bytes > self._memory_bytes:
                return
            task, attempt = self._queue.popleft()
            actor = self._idle.popleft()
            reference = actor.run.remote(task.method, task.arguments)
            self._running[reference] = actor, task, attempt


def _process(actor: Any) -> int:
    """An actor's process number, once it lives: Ray may be restarting it.

    Raises:
        WorkerError: it did not come back.
    """
    deadline = time.monotonic() + RESTART_PATIENCE_S
    while True:
        try:
            return int(ray.get(actor.process.remote()))
        except RayError as failure:
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"a worker died and did not come back in {RESTART_PATIENCE_S} s "
                    f"({_line(failure)}); what was measured is kept: "
                    "run the same command again"
                ) from failure
            time.sleep(0.2)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _connect(address: str) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a notice
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == LOCAL:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkerError(
            f"can't connect to Ray at '{address}' ({_line(error)}); "
            "start one with `ray start --head`, or leave out --address"
        ) from error
