"""Profiles: products and a few whole maps timed on a device, each once, and the model they make.

Times are taken by one worker with all the cores that a serving process would have, one task at a
time, and committed as they come: a profile that is killed goes on where it was.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.progress import Progress
from cost_models import cache_bytes, measured, weight_bytes
from cost_models.measured import Fit
from cost_models.memory import PHASES, Phase, Workload
from engines.base import Cell, Engine, Exercise
from quantization.errors import BitfrontError, EngineError, KernelError, WorkerDiedError
from quantization.precision_map import map_hash
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout
from search.problem import Choice
from store.database import Store
from store.queries import key_of
from store.tables import CellTime, MapTime
from store.times import Place, cell_times, map_times, save_time
from workers.pool import Pool, Task

CELLS, MAPS = "timing products", "timing whole maps"
TOGETHER = 4
"""Products that a task times: few, since a kill loses what a task has not told."""
ANCHORS, SPREAD = 9, 0.25
"""Maps to fit on, and how far their units' places between smallest and largest scheme lie apart."""
MAP_WEIGHT = 4.0
GENERATED = 96
NOISY = 0.15
"""Of a median: a spread beyond it swamps the differences that a search would act on."""


class NoTimesError(BitfrontError):
    """Times that a question needs and that nobody could take."""


@dataclass(frozen=True)
class Subject:
    """What is timed where.

    Args:
        place: device, engine, kernels, threads.
        engine: that of the place.
        workload: what the phases are timed for.
        layout: the model's units.
        menu: the schemes, columns of all tables.
        offered: units x schemes, those that are timed.
        watched: whether maps' energy is wanted, too.
    """

    place: Place
    engine: Engine
    workload: Workload
    layout: Layout
    menu: tuple[Scheme, ...]
    offered: NDArray[np.bool_]
    watched: bool = False

    @property
    def choices(self) -> list[list[Scheme]]:
        """The schemes of each unit."""
        return [[s for s, on in zip(self.menu, row, strict=True) if on] for row in self.offered]

    @property
    def cells(self) -> list[Cell]:
        """All products that its tables need."""
        return measured.cells(self.layout, self.choices, self.engine, self.workload)

    @property
    def exercise(self) -> Exercise:
        """What whole maps are timed at."""
        load = self.workload
        return Exercise(load.prompt, load.context, GENERATED, self.place.threads, load.batch)

    def schemes(self, choice: Choice) -> tuple[Scheme, ...]:
        """Those of an assignment."""
        return tuple(self.menu[column] for column in choice)

    @property
    def reference(self) -> tuple[Scheme, ...]:
        """The map that all others are timed in turns with, whatever the menu."""
        wanted = self.engine.reference
        return tuple(
            Scheme(FULL_PRECISION)
            if unit.kind == "cache" or any(self.engine.refusal(site, wanted) for site in unit.sites)
            else wanted
            for unit in self.layout.units
        )

    def map_of(self, schemes: Sequence[Scheme]) -> str:
        """What tells the times of a map from others': shapes and schemes."""
        pairs = [(scheme.weight, scheme.activation) for scheme in schemes]
        shapes = [site.shape for unit in self.layout.units for site in unit.sites]
        return key_of(map_hash(self.layout, pairs), *shapes)

    def cell_key(self, cell: Cell) -> str:
        """Of the store."""
        return self.place.of(cell.shape, cell.kernel, cell.batch)

    def map_key(self, choice: Choice) -> str:
        """Of the store."""
        maps = self.map_of(self.schemes(choice)), self.map_of(self.reference)
        return self.place.of(*maps, *self.exercise.key)

    @property
    def anchors(self) -> list[Choice]:
        """Maps to fit on, from the smallest to the largest: mixes, since it is mixes that are predicted."""
        generator = np.random.default_rng(0)
        nbytes = weight_bytes.table(self.layout, self.menu, self.engine)
        nbytes = nbytes + cache_bytes.table(self.layout, self.menu, self.workload)
        order = np.argsort(np.where(self.offered, nbytes, np.inf), axis=1, kind="stable")
        counts = self.offered.sum(axis=1)
        rows = np.arange(len(order))
        caches = np.array([unit.kind == "cache" for unit in self.layout.units])
        found = []
        for step in range(ANCHORS):
            place = step / (ANCHORS - 1)
            drawn = np.clip(generator.normal(place, SPREAD, len(rows)), 0, 1)
            drawn[caches] = 1  # what they cost is in no product
            found.append(order[rows, np.round(drawn * (counts - 1)).astype(int)])
        return found


@dataclass(frozen=True)
class Profile:
    """What is known of a subject's times."""

    subject: Subject
    cells: Mapping[Cell, CellTime]
    maps: tuple[tuple[Choice, MapTime], ...]

    @cached_property
    def seconds(self) -> dict[Cell, float]:
        """Of all products that could be timed."""
        return {c: t.median_s for c, t in self.cells.items() if t.median_s is not None}

    @cached_property
    def fits(self) -> dict[Phase, Fit]:
        """What turns sums of products into a phase's seconds."""
        return {phase: self._fit(phase) for phase in PHASES}

    def table_s(self, phase: Phase) -> NDArray[np.float64]:
        """Units x schemes, seconds; with `fits[phase].overhead_s` they make a map's. NaN: unknown."""
        subject, fit = self.subject, self.fits[phase]
        scaled = {cell: fit.gain(cell.kernel) * s for cell, s in self.seconds.items()}
        return measured.table(
            subject.layout, subject.menu, subject.engine, subject.workload, phase, scaled
        )

    def predict(self, choice: Choice, phase: Phase) -> tuple[float, float]:
        """Seconds of a map, and their standard error."""
        return self.fits[phase].predict(self._sums(choice, phase))

    def measured_s(self, row: MapTime, phase: Phase) -> float:
        """What a map took, were the machine as fast as it usually is."""
        usual = np.median([np.median(_phase(other, phase)[1]) for _, other in self.maps])
        return float(usual) * measured.Ratio.of(*_phase(row, phase)).value

    def joules(self) -> dict[Phase, list[tuple[float | None, float]]]:
        """Joules (None: not watched) and seconds of each map that was run."""
        return {
            phase: [
                (row.prefill_j if phase == "prefill" else row.decode_j, self.measured_s(row, phase))
                for _, row in self.maps
            ]
            for phase in PHASES
        }

    @property
    def no_joules(self) -> str:
        """Why no map's energy is known, where none is."""
        counter, why = self.subject.engine.counter()
        return f"nobody watched the maps that were timed ({why})" if counter else why

    @property
    def noisy(self) -> list[CellTime]:
        """Products whose repeats differ more than schemes do."""
        return [
            c for c in self.cells.values() if c.median_s and (c.spread_s or 0) > NOISY * c.median_s
        ]

    @property
    def failed(self) -> list[CellTime]:
        """Products that could not be timed."""
        return [c for c in self.cells.values() if c.failure]

    def _fit(self, phase: Phase) -> Fit:
        sums = [self._sums(choice, phase) for choice, _ in self.maps]
        seconds = [self.measured_s(row, phase) for _, row in self.maps]
        errors = [measured.Ratio.of(*_phase(row, phase)).error for _, row in self.maps]
        return measured.fit(sums, seconds, errors)

    def _sums(self, choice: Choice, phase: Phase) -> dict[str, float]:
        s = self.subject
        return measured.features(
            s.layout, s.schemes(choice), s.engine, s.workload, phase, self.seconds
        )


def _phase(row: MapTime, phase: Phase) -> tuple[list[float], list[float]]:
    """A map's seconds and those of the reference beside it."""
    if phase == "prefill":
        return row.prefill_s, row.reference_prefill_s
    return row.decode_s, row.reference_decode_s


def profile(subject: Subject, store: Store, pool: Pool, progress: Progress) -> Profile:
    """Time what the store doesn't have, and return all of it.

    Raises:
        EngineError: the engine isn't there, or can't run the model at all.
    """
    with pool.exclusively(f"timing:{subject.place.of()}"):  # or two would disturb each other
        return _profile(subject, store, pool, progress)


def _profile(subject: Subject, store: Store, pool: Pool, progress: Progress) -> Profile:
    keys = {cell: subject.cell_key(cell) for cell in subject.cells}
    usual_s = _usual_s(subject, store, pool)
    known = cell_times(store, list(keys.values()))
    missing = [cell for cell, key in keys.items() if key not in known]
    progress.expect({CELLS: float(len(missing)), MAPS: MAP_WEIGHT * ANCHORS})
    with progress.stage(CELLS, len(missing)) as advance:
        for start in range(0, len(missing), TOGETHER):
            part = missing[start : start + TOGETHER]
            for row, lasts in _time_cells(subject, pool, part, usual_s):
                if lasts:
                    save_time(store, row)
                known[row.key] = row
                advance(1)
    cells = {cell: known[key] for cell, key in keys.items()}
    failed = {cell for cell, time in cells.items() if time.failure}
    anchors = [c for c in subject.anchors if not failed & _needed(subject, c)]
    if not anchors:
        reasons = sorted({time.failure for time in cells.values() if time.failure})
        raise NoTimesError(f"no map could be timed: {'; '.join(reasons)}")
    maps = time_maps(subject, store, pool, progress, anchors)
    return Profile(subject, cells, tuple(zip(anchors, maps, strict=True)))


def time_maps(
    subject: Subject,
    store: Store,
    pool: Pool,
    progress: Progress,
    maps: Sequence[Choice],
    label: str = MAPS,
) -> list[MapTime]:
    """Run whole maps in the engine, but for those that the store has."""
    keys = [subject.map_key(choice) for choice in maps]
    known = _known_maps(subject, store, keys)
    if len(known) == len(set(keys)):
        return [known[key] for key in keys]
    with pool.exclusively(f"timing maps:{subject.place.of()}"):
        known |= _time_maps(
            subject, store, pool, progress, dict(zip(keys, maps, strict=True)), label
        )
    return [known[key] for key in keys]


def _known_maps(subject: Subject, store: Store, keys: Sequence[str]) -> dict[str, MapTime]:
    """What the store has; without maps that nobody watched, where their energy is wanted."""
    found = map_times(store, keys)
    if not subject.watched:
        return found
    return {key: row for key, row in found.items() if row.prefill_j and row.decode_j}


def _time_maps(
    subject: Subject,
    store: Store,
    pool: Pool,
    progress: Progress,
    maps: Mapping[str, Choice],
    label: str,
) -> dict[str, MapTime]:
    known = _known_maps(subject, store, list(maps))
    missing = {k: c for k, c in maps.items() if k not in known}
    names = tuple(scheme.name for scheme in subject.reference)
    with progress.stage(label, len(missing), MAP_WEIGHT) as advance:
        for key, choice in missing.items():
            own = tuple(s.name for s in subject.schemes(choice))
            arguments = {
                "engine": subject.engine.name, "device": subject.place.device, "schemes": own,
                "reference": names, "exercise": subject.exercise,
            }  # fmt: skip
            run, beside = _one(pool, Task("time_map", arguments))
            known[key] = MapTime(
                key=key, **vars(subject.place), map=subject.map_of(subject.schemes(choice)),
                workload=asdict(subject.workload), prefill_s=list(run.prefill_s),
                decode_s=list(run.decode_s), prefill_j=run.prefill_j, decode_j=run.decode_j,
                reference=subject.map_of(subject.reference),
                reference_prefill_s=list(beside.prefill_s),
                reference_decode_s=list(beside.decode_s),
            )  # fmt: skip
            save_time(store, known[key])
            advance(1)
    return known


def _usual_s(subject: Subject, store: Store, pool: Pool) -> float:
    """What the reference product takes at the place, timed when it was first asked for."""
    cell = subject.engine.reference_cell
    key = subject.cell_key(cell)
    known = cell_times(store, [key]).get(key)
    if known is None or known.median_s is None:
        ((known, _),) = _time_cells(subject, pool, [cell], None)
        if known.median_s is None:
            raise NoTimesError(f"{subject.engine.name} can't be timed here: {known.failure}")
        save_time(store, known)
    return known.median_s


def _time_cells(
    subject: Subject, pool: Pool, cells: Sequence[Cell], usual_s: float | None
) -> list[tuple[CellTime, bool]]:
    """Times of some products, and whether they last; where one fails, each by itself.

    A kernel that isn't there won't be tomorrow. A worker that died, or a machine without memory,
    says nothing of the next attempt.
    """
    place = subject.place
    arguments = {
        "engine": place.engine, "device": place.device, "threads": place.threads,
        "usual_s": usual_s,
    }  # fmt: skip
    failure, lasts = None, True
    try:
        found = _one(pool, Task("time_cells", {**arguments, "cells": list(cells)}))
    except (EngineError, WorkerDiedError) as error:  # a kernel may take its worker along
        if len(cells) > 1:
            return [t for cell in cells for t in _time_cells(subject, pool, [cell], usual_s)]
        found, failure, lasts = [None], str(error), isinstance(error, KernelError)
    rows = [
        CellTime(
            key=subject.cell_key(cell), **vars(place), rows=cell.shape[0],
            columns=cell.shape[1], kernel=cell.kernel, batch=cell.batch, failure=failure,
            median_s=time and time.median_s, spread_s=time and time.spread_s,
        )
        for cell, time in zip(cells, found, strict=True)
    ]  # fmt: skip
    return [(row, lasts) for row in rows]


def _needed(subject: Subject, choice: Choice) -> set[Cell]:
    chosen = [[scheme] for scheme in subject.schemes(choice)]
    return set(measured.cells(subject.layout, chosen, subject.engine, subject.workload))


def _one(pool: Pool, task: Task) -> Any:
    """A task's value; nothing else runs meanwhile."""
    with closing(pool.run([task])) as outcomes:
        outcome = next(outcomes)
    if outcome.error:
        raise outcome.error
    return outcome.value
