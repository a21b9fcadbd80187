"""Workers as Ray actors: on this machine, or on a cluster.

Each actor holds one replica and works on one task at a time; free actors take the next task in
the queue, so a slow one delays nobody. Ray restarts an actor that died (killed, out of memory),
and its task goes back to the front of the queue.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from math import inf
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from quantization.errors import BitfrontError, WorkerDiedError, WorkerError
from workers.pool import Outcome, Pool, Task, call, make_session

LOCAL = "local"
MOST_LOCAL_WORKERS = 8
ATTEMPTS = 3
RESTART_PATIENCE_S = 120
START_PATIENCE_S = 300
SHARE_S = 3.0
"""How often a pool that shares workers with others looks how many are its own."""
START_PAUSE_S = 1.0
PATIENT_S = 60.0
"""How long a pool waits for its first worker before it says so: a node may have much to import."""
MOST_FAILED_STARTS = 10
OBJECT_STORE_BYTES = 128 * 2**20  # tasks and results are small; weights travel by the page cache


class _Worker:
    """The actor."""

    def __init__(self, make: Callable[[Any], Any], spec: Any) -> None:
        self._session = make(spec)

    def run(self, method: str, arguments: dict[str, Any]) -> Any:
        """Call a method of the session; its errors are values, Ray's are exceptions."""
        try:
            return call(self._session, method, arguments), None
        except BitfrontError as error:
            return None, error

    def process(self) -> int:
        """The process number: answers once the actor lives."""
        return os.getpid()


@dataclass(frozen=True)
class Needs:
    """Workers, and what each needs of a cluster, by Ray's names; None is left to us.

    Args:
        workers: replicas; by default one a GPU, or up to eight a machine.
        cpus: cores of each, and so its threads; by default its share of all.
        gpus: of each; by default one where there are any.
        accelerator_type: such as `H100`, where nodes differ.
        memory_bytes: of each, which Ray reserves.
        forecast_bytes: of each, on a CPU; reserved on a cluster where `memory_bytes` isn't said, but
            no more than half of what its largest node has: another job may want to run, too.
    """

    workers: int | None = None
    cpus: float | None = None
    gpus: float | None = None
    accelerator_type: str | None = None
    memory_bytes: int | None = None
    forecast_bytes: int | None = None


class RayPool(Pool):
    """A pool of actors.

    Args:
        spec: what each worker needs; `threads` is overruled by what a worker's share of cores is.
        address: a Ray cluster's address, or `local` for a Ray of our own.
        needs: how many actors, and what each needs.
        share: the part of the workers that is this pool's at the moment, above 0 and up to 1; the
            pool shrinks and grows with it, to one actor at least, and waits for room as long as
            that takes. None: all of them, now.
        make: makes what does the work, in the actor.
        notice: is told when no actor could be started for a while, and when one was.
    """

    def __init__(
        self,
        spec: Any,
        address: str = LOCAL,
        needs: Needs = Needs(),  # frozen
        share: Callable[[], float] | None = None,
        make: Callable[[Any], Any] = make_session,
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        _connect(address)
        resources = ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)), max(int(resources.get("CPU", 1)), 1)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        machines = [node.get("CPU", 0) for node in nodes]
        most = needs.workers or gpus or min(cores, MOST_LOCAL_WORKERS * max(len(machines), 1))
        memory = needs.memory_bytes or 0
        largest = int(max(machines, default=1)) or 1
        own = cores // most if needs.cpus is None else int(needs.cpus)
        if not memory and address != LOCAL and not gpus and needs.forecast_bytes:
            memory = _within(needs.forecast_bytes, nodes)
            fits = [(node, _fits(node, memory)) for node in nodes]
            room = sum(count for _, count in fits)
            if room and needs.workers is None and needs.cpus is None:
                most = min(most, room)
                own = min(int(node["CPU"]) // count for node, count in fits if count)
        threads = max(min(own, largest), 1)
        options: dict[str, Any] = {
            "num_cpus": min(threads, cores / most) if needs.cpus is None else needs.cpus,
            "num_gpus": min(1, gpus / most) if needs.gpus is None else needs.gpus,
            "max_restarts": -1,
        }
        if needs.accelerator_type:
            options["accelerator_type"] = needs.accelerator_type
        if memory:
            options["memory"] = memory
        if is_dataclass(spec) and not isinstance(spec, type):
            spec = replace(spec, threads=threads)
        actor = ray.remote(_Worker).options(**options)
        self._new_actor: Callable[[], Any] = lambda: actor.remote(make, spec)
        self._most, self._share, self._shared_at = most, share, -inf
        self._notice, self._wanted = notice, _said(options)
        self._begun, self._waits = time.monotonic(), False
        self.workers = most
        # a GPU has one worker, and its memory to itself
        self._memory_bytes = inf if gpus else resources.get("memory", inf)
        self._queue: deque[tuple[Task, int]] = deque()
        self._running: dict[Any, tuple[Any, Task, int]] = {}
        self._idle: deque[Any] = deque()
        self._starting: dict[Any, Any] = {}
        self._failed_starts = 0
        self._ready: deque[Outcome | Exception] = deque()
        self._actors: list[Any] = []
        if share is None:
            self._actors = [self._new_actor() for _ in range(most)]
            self._await_actors()
            self._idle.extend(self._actors)
        else:
            self._resize()

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

    def _resize(self) -> None:
        """Follow the share: start actors, or stop those that are idle or still starting."""
        if self._share is None or time.monotonic() - self._shared_at < SHARE_S:
            return
        self._shared_at = time.monotonic()
        self.workers = max(1, round(self._most * self._share()))
        while len(self._actors) < self.workers:
            actor = self._new_actor()
            self._actors.append(actor)
            self._starting[actor.process.remote()] = actor
        for reference, actor in list(self._starting.items()):
            if len(self._actors) > self.workers:
                del self._starting[reference]
                self._stop(actor)
        while self._idle and len(self._actors) > self.workers:
            self._stop(self._idle.pop())

    def _stop(self, actor: Any) -> None:
        self._actors.remove(actor)
        ray.kill(actor, no_restart=True)

    def _free(self, actor: Any) -> None:
        """An actor that has nothing to do: it waits, or goes where there are too many."""
        if len(self._actors) > self.workers:
            self._stop(actor)
        else:
            self._idle.appendleft(actor)  # a bank that it has begun it goes on with

    def submit(self, task: Task) -> None:
        """See `Pool.submit`."""
        self._queue.append((task, 1))
        self._dispatch()

    def next(self) -> Outcome:
        """See `Pool.next`."""
        while True:
            if not self._running and not self._queue and not self._ready:
                raise LookupError("no task is queued")
            self._resize()
            self._dispatch()
            self._collect()
            if self._ready:
                found = self._ready.popleft()
                if isinstance(found, Outcome):
                    return found
                raise found

    def _collect(self) -> None:
        """Take all that has ended; wait where there is nothing to give the caller yet.

        Every worker that is free has its next task then, while the caller saves one result.
        """
        wanted = [*self._running, *self._starting]
        if not self._ready:
            ray.wait(wanted, num_returns=1, timeout=SHARE_S if self._share else None)
        done, _ = ray.wait(wanted, num_returns=len(wanted), timeout=0) if wanted else ([], [])
        for reference in done:
            try:
                if reference in self._starting:
                    self._started(reference)
                elif outcome := self._ended(reference):
                    self._ready.append(outcome)
            except (RayTaskError, WorkerError) as error:  # told after what others have measured
                self._ready.append(error)
        self._tell_of_waiting()

    def _tell_of_waiting(self) -> None:
        """Say that nothing goes on since no actor starts, once, and when it goes on."""
        waited = time.monotonic() - self._begun
        if len(self._starting) < len(self._actors):
            if self._waits:
                self._notice(f"a worker has started, after {waited:.0f} s")
            self._waits, self._begun = False, time.monotonic()
        elif not self._waits and waited > PATIENT_S:
            self._waits = True
            there = ray.available_resources()
            free = ", ".join(_resource(n, there.get(n, 0.0)) for n in ("CPU", "GPU", "memory"))
            self._notice(
                f"waits: no worker has started for {waited:.0f} s; each wants {self._wanted}, and "
                f"free on the cluster are {free}"
            )

    def _started(self, reference: Any) -> None:
        """An actor is there, or can't be made: then another one is."""
        actor = self._starting.pop(reference)
        try:
            ray.get(reference)
        except RayError as failure:
            self._stop(actor)
            self._shared_at = -inf
            self._failed_starts += 1
            if self._failed_starts >= MOST_FAILED_STARTS:
                raise WorkerError(
                    f"{MOST_FAILED_STARTS} workers in a row could not be started "
                    f"({_line(failure)}); install this version of Bitfront on every node"
                ) from failure
            time.sleep(START_PAUSE_S)
        else:
            self._failed_starts = 0
            self._free(actor)

    def _ended(self, reference: Any) -> Outcome | None:
        """What a task came to; None where its worker died, and it is queued again."""
        actor, task, attempt = self._running.pop(reference)
        try:
            value, error = ray.get(reference)
        except RayTaskError:  # a bug in the task, which another worker would repeat
            raise
        except RayError as failure:
            self._free(actor)
            self._retry(task, attempt, failure)
            return None
        self._free(actor)
        self._dispatch()
        return Outcome(task, value, error)

    def processes(self) -> list[int]:
        """The workers' process numbers."""
        return [_process(actor) for actor in self._actors]

    def drop(self) -> None:
        """See `Pool.drop`."""
        self._queue.clear()
        self._ready.clear()
        while self._running:
            self.next()
            self._ready.clear()

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


def _within(forecast_bytes: int, nodes: list[dict[str, float]]) -> int:
    """The forecast, as far as half of a node that has cores has so much memory."""
    most = max((node.get("memory", 0) for node in nodes if node.get("CPU")), default=0)
    return int(min(forecast_bytes, most / 2))


def _fits(node: dict[str, float], memory: int) -> int:
    """How many workers a node has cores and memory for."""
    by_memory = node.get("memory", 0) // memory if memory else inf
    return int(min(MOST_LOCAL_WORKERS, node.get("CPU", 0), by_memory))


def _said(options: dict[str, Any]) -> str:
    """What an actor needs, in words."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    said = [_resource(name, options[o]) for o, name in names.items() if options.get(o)]
    return ", ".join(
        [*said, *([options["accelerator_type"]] if "accelerator_type" in options else [])]
    )


def _resource(name: str, amount: float) -> str:
    return f"{amount / 2**30:.1f} GiB of memory" if name == "memory" else f"{amount:g} {name}"


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
