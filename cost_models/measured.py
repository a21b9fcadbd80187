"""Seconds of units under schemes from measured products, corrected by whole models that were run.

    t(map) = gain x sum of its products + overhead

What a table of products leaves out (attention, norms, rotary embedding, waiting between products)
is the same for all maps; what it gets wrong (products in a model find other data in the caches than
products on their own) is a factor. Both are fitted on a few maps that the engine has run end to
end, and what those still differ by is the model's error.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cost_models.memory import Workload
from engines.base import Cell, Engine
from quantization.schemes import Scheme
from quantization.units import Layout, Unit

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
AT_ONCE = 512
"""Tokens that an engine puts through a layer together; a longer prompt takes several turns."""


@dataclass(frozen=True)
class Product:
    """A cell and how often a unit needs it in a phase."""

    cell: Cell
    times: int


def products(
    unit: Unit, scheme: Scheme, engine: Engine, workload: Workload, phase: Phase
) -> list[Product]:
    """The products of a unit. Looking up an embedding is none; a head works on last tokens only."""
    tokens = workload.batch if phase == "decode" else workload.batch * workload.prompt
    turns, rows = ceil(tokens / AT_ONCE), min(tokens, AT_ONCE)
    found = []
    for index, site in enumerate(unit.sites):
        if unit.kind == "embedding" and index == 0:
            continue
        is_head = unit.kind in ("embedding", "head")
        rows_, turns_ = (workload.batch, 1) if is_head else (rows, turns)
        shape = (site.shape[-2], site.shape[-1])
        found.append(Product(Cell(shape, engine.kernel(scheme, site.shape), rows_), turns_))
    return found


def cells(
    layout: Layout,
    choices: Sequence[Sequence[Scheme]],
    engine: Engine,
    workload: Workload,
    phases: Iterable[Phase] = PHASES,
) -> list[Cell]:
    """All cells that a job's tables need, each once."""
    found = {
        product.cell: None
        for phase in phases
        for unit, schemes in zip(layout.units, choices, strict=True)
        for scheme in schemes
        for product in products(unit, scheme, engine, workload, phase)
    }
    return list(found)


def table(
    layout: Layout,
    menu: Sequence[Scheme],
    engine: Engine,
    workload: Workload,
    phase: Phase,
    seconds: Mapping[Cell, float],
) -> NDArray[np.float64]:
    """Units x schemes, seconds of all products; NaN where a cell has no time."""
    found = np.full((len(layout.units), len(menu)), np.nan)
    for row, unit in enumerate(layout.units):
        for column, scheme in enumerate(menu):
            if any(engine.refusal(site, scheme) for site in unit.sites):
                continue
            own = products(unit, scheme, engine, workload, phase)
            found[row, column] = sum(p.times * seconds.get(p.cell, np.nan) for p in own)
    return found


@dataclass(frozen=True)
class Fit:
    """From a sum of products to a phase's seconds.

    Args:
        gain: of the sum.
        overhead_s: on top of it.
        error: relative, of one prediction (one standard deviation); None where too few maps ran.
        runs: how many maps it was fitted on.
    """

    gain: float = 1.0
    overhead_s: float = 0.0
    error: float | None = None
    runs: int = 0

    def predict(self, sum_s: float) -> float:
        """Seconds of a map."""
        return self.gain * sum_s + self.overhead_s


def fit(sums_s: Sequence[float], measured_s: Sequence[float]) -> Fit:
    """Least squares of relative errors; neither gain nor overhead is below zero.

    Args:
        sums_s: of the products of some maps.
        measured_s: what those maps took.
    """
    x, y = np.asarray(sums_s, dtype=float), np.asarray(measured_s, dtype=float)
    if len(x) == 0:
        return Fit()
    rows = np.column_stack([x, np.ones_like(x)]) / y[:, None]
    (gain, overhead), *_ = np.linalg.lstsq(rows, np.ones(len(y)), rcond=None)
    if overhead < 0 or len(x) < 2:
        gain, overhead = float((x / y).sum() / ((x / y) ** 2).sum()), 0.0
    elif gain < 0:
        gain, overhead = 0.0, float((1 / y).sum() / (1 / y**2).sum())
    residual = (gain * x + overhead) / y - 1
    free = len(x) - 2
    error = sqrt(float((residual**2).sum()) / free) if free > 0 else None
    return Fit(float(gain), float(overhead), error, len(x))
