"""Progress of a job on stderr: a bar a stage, and one over all with the time that is left."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import inf
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from store.database import Store
from store.queries import add_seconds

Advance = Callable[[int], None]
SECONDS_BETWEEN_LINES = 10


class Progress(Protocol):
    """What the pipeline reports to. Work is counted in measurements of a candidate on a chunk."""

    def expect(self, work: Mapping[str, float]) -> None:
        """The work that each stage will probably take, by label; more is added to what was said."""

    @contextmanager
    def stage(self, label: str, steps: int, weight: float = 1) -> Iterator[Advance]:
        """A stage of `steps`, each worth `weight`; yields the function that reports steps done."""


class Silent:
    """Reports nothing."""

    def expect(self, work: Mapping[str, float]) -> None:
        """See `Progress.expect`."""

    @contextmanager
    def stage(self, label: str, steps: int, weight: float = 1) -> Iterator[Advance]:
        """See `Progress.stage`."""
        yield lambda _: None


class Clocked:
    """Passes everything on, and keeps how long each stage of a job took, in all its runs."""

    def __init__(self, progress: Progress, store: Store, job_id: int) -> None:
        self._progress, self._store, self._job_id = progress, store, job_id

    def expect(self, work: Mapping[str, float]) -> None:
        """See `Progress.expect`."""
        self._progress.expect(work)

    @contextmanager
    def stage(self, label: str, steps: int, weight: float = 1) -> Iterator[Advance]:
        """See `Progress.stage`."""
        start, done = time.monotonic(), 0

        def counted(count: int) -> None:
            nonlocal done
            done += count
            advance(count)

        try:
            with self._progress.stage(label, steps, weight) as advance:
                yield counted
        finally:
            if done:
                add_seconds(self._store, self._job_id, label, time.monotonic() - start, done)


class Lines:
    """A line every ten seconds and one a finished stage, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._expected: dict[str, float] = {}
        self._done, self._start, self._latest = 0.0, time.monotonic(), -inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def expect(self, work: Mapping[str, float]) -> None:
        """See `Progress.expect`."""
        self._expected |= work

    @contextmanager
    def stage(self, label: str, steps: int, weight: float = 1) -> Iterator[Advance]:
        """See `Progress.stage`."""
        self._expected[label] = steps * weight
        done = 0
        self._print(f"{label} …")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._done += count * weight
            if time.monotonic() - self._latest >= SECONDS_BETWEEN_LINES or done >= steps:
                self._print(f"{label} {done}/{steps}")

        yield advance

    def _print(self, text: str) -> None:
        self._latest = time.monotonic()
        share = self._done / max(sum(self._expected.values()), 1)
        elapsed = self._latest - self._start
        self._console.print(f"{elapsed:6.0f} s  {share:4.0%}  {text}", highlight=False)


class RichProgress:
    """Bars on a console. The whole's total is corrected as stages find out what is left to do."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
            speed_estimate_period=120,
        )
        self._expected: dict[str, float] = {}
        self._whole = self._bars.add_task("the whole job", total=None)
        self._done = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def expect(self, work: Mapping[str, float]) -> None:
        """See `Progress.expect`."""
        self._expected |= work

    @contextmanager
    def stage(self, label: str, steps: int, weight: float = 1) -> Iterator[Advance]:
        """See `Progress.stage`."""
        self._expected[label] = steps * weight
        self._update()
        task = self._bars.add_task(label, total=steps or 1, completed=0 if steps else 1)

        def advance(count: int) -> None:
            self._bars.advance(task, count)
            self._done += count * weight
            self._update()

        yield advance
        self._bars.update(task, completed=steps or 1)

    def _update(self) -> None:
        total = round(sum(self._expected.values()))
        self._bars.update(self._whole, total=total or 1, completed=round(self._done))
