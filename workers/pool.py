"""The task interface: submit tasks, take outcomes as they come. And the pool without processes."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from safetensors import SafetensorError

from quantization.errors import BitfrontError, WorkerError

if TYPE_CHECKING:
    from workers.session import SessionSpec  # torch, which a driver of many workers needn't load

OUT_OF_MEMORY = "OutOfMemoryError"
"""torch's, by name."""


@dataclass(frozen=True)
class Task:
    """A call of one of `Session`'s methods. Idempotent: a lost one is simply run again.

    Args:
        label: the caller's own handle, returned with the outcome.
        memory_bytes: a forecast of what the task will need beside the worker's own memory.
        key: of its result in the store, where other drivers may be at the same task.
        table: of the store that has the key.
    """

    method: str
    arguments: dict[str, Any] = field(default_factory=dict)
    label: Any = None
    memory_bytes: int = 0
    key: str | None = None
    table: Any = None


@dataclass(frozen=True)
class Outcome:
    """What became of a task: a value, or the error that its work raised.

    Where it is `known`, another driver has done it, and the store has the result.
    """

    task: Task
    value: Any = None
    error: BitfrontError | None = None
    known: bool = False


def make_session(spec: "SessionSpec") -> Any:
    """What does the work in a worker's process."""
    from workers.session import Session

    return Session(spec)


def call(session: Any, method: str, arguments: dict[str, Any]) -> Any:
    """Call a method of a session; what a machine refuses (disk, memory) becomes one line.

    Raises:
        BitfrontError: of the work itself, or for the machine's refusal.
    """
    try:
        return getattr(session, method)(**arguments)
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != OUT_OF_MEMORY:
            raise
        raise WorkerError(
            f"'{method}' failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}; "
            "what was measured is kept: mend it, then run the same command again"
        ) from error


class Pool(ABC):
    """Runs tasks. Not thread-safe: one driver owns it.

    A task whose worker dies is run again elsewhere, a few times; an error that the work itself
    raises is an outcome and never retried. Leaving the context closes the pool.
    """

    workers: int

    @abstractmethod
    def submit(self, task: Task) -> None:
        """Queue a task; returns at once."""

    @abstractmethod
    def next(self) -> Outcome:
        """Wait for the next outcome, in any order.

        Raises:
            WorkerError: a task lost its worker too often.
            LookupError: nothing is queued.
        """

    @abstractmethod
    def drop(self) -> None:
        """Forget the tasks whose outcomes nobody has taken; returns once none is running."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers; queued tasks are dropped."""

    @contextmanager
    def exclusively(self, key: str) -> Iterator[None]:
        """While no other driver does what has this key, where drivers share a store."""
        yield

    def run(self, tasks: Iterable[Task]) -> Generator[Outcome]:
        """Submit all, yield outcomes as they come; one that is left early drops the others.

        Where somebody goes on with the pool after an error, close it (`contextlib.closing`).
        """
        left = 0
        for task in tasks:
            self.submit(task)
            left += 1
        try:
            while left:
                left -= 1
                yield self.next()
        finally:
            if left:
                self.drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InProcessPool(Pool):
    """One worker: the calling process. For tests, debugging and exports."""

    workers = 1

    def __init__(self, spec: "SessionSpec") -> None:
        self._session = make_session(spec)
        self._queue: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        """See `Pool.submit`."""
        self._queue.append(task)

    def next(self) -> Outcome:
        """See `Pool.next`."""
        task = self._queue.popleft()
        try:
            return Outcome(task, call(self._session, task.method, task.arguments))
        except BitfrontError as error:
            return Outcome(task, error=error)

    def drop(self) -> None:
        """See `Pool.drop`."""
        self._queue.clear()

    def close(self) -> None:
        """See `Pool.close`."""
        self._queue.clear()
        self._session.close()
