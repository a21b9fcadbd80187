"""Seconds of units under schemes from measured products, corrected by whole models that were run.

    t(map) = sum over kernels k of gain_k x (its products' sum) + overhead

What a table of products leaves out (attention, norms, waiting between products) is the same for all
maps; what it gets wrong is a factor of each kernel, since products in a model find other data in the
caches than products on their own. Both are fitted on some maps that the engine has run end to end:
linear regression with a Gaussian prior around the table as it is, whose posterior tells how sure a
prediction is.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from cost_models.memory import PHASES, Phase, Workload
from engines.base import Cell, Engine
from quantization.schemes import Scheme
from quantization.units import Layout, Site, Unit

COMMON_GAIN, OWN_GAIN = 0.5, 0.06
"""Prior deviations of what all kernels' gains share, and of each one's own."""
NOISE, LEAST_NOISE, STEPS = 0.03, 0.003, 30
Floats = NDArray[np.float64]
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
    """The products of a unit. Looking up an embedding is none; a head works on last tokens only.

    Attention is in what all maps take, whatever its cache is kept in.
    """
    if unit.kind == "cache":
        return []
    tokens = workload.batch if phase == "decode" else workload.batch * workload.prompt
    turns = [(AT_ONCE, tokens // AT_ONCE), (tokens % AT_ONCE, 1)]
    found = []
    for index, site in enumerate(unit.sites):
        if unit.kind == "embedding" and index == 0:
            continue
        if unit.kind == "experts":
            found += _of_experts(unit, site, engine.kernel(scheme, site.shape), tokens)
            continue
        is_head = unit.kind in ("embedding", "head")
        shape, kernel = (site.shape[-2], site.shape[-1]), engine.kernel(scheme, site.shape)
        for rows, times in [(workload.batch, 1)] if is_head else turns:
            if rows and times:
                found.append(Product(Cell(shape, kernel, rows), times))
    return found


def _of_experts(unit: Unit, site: Site, kernel: str, tokens: int) -> list[Product]:
    """Each token goes to some experts; a prompt's are spread evenly over all of them."""
    experts, rows, columns = site.shape
    visits = tokens * (unit.active or 1)
    busy = min(experts, visits)
    return [Product(Cell((rows, columns), kernel, -(-visits // busy)), busy)]


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
            if engine.unit_refusal(unit, scheme):
                continue
            own = products(unit, scheme, engine, workload, phase)
            found[row, column] = sum(p.times * seconds.get(p.cell, np.nan) for p in own)
    return found


def features(
    layout: Layout,
    schemes: Sequence[Scheme],
    engine: Engine,
    workload: Workload,
    phase: Phase,
    seconds: Mapping[Cell, float],
) -> dict[str, float]:
    """Of one map, by kernel: the sum of the seconds of its products."""
    sums: dict[str, float] = defaultdict(float)
    for unit, scheme in zip(layout.units, schemes, strict=True):
        for product in products(unit, scheme, engine, workload, phase):
            sums[product.cell.kernel] += product.times * seconds.get(product.cell, np.nan)
    return dict(sums)


@dataclass(frozen=True)
class Ratio:
    """How much longer a map takes than the reference that was timed in turns with it.

    The median over pairs of neighbours: what slows the machine for a moment slows both of a pair, or
    is an outlier. `error` is its relative standard error, from the interquartile range as if the
    pairs were normal (1.349 deviations; a median's error is 1.253 times a mean's).
    """

    value: float
    error: float

    @classmethod
    def of(cls, own_s: Sequence[float], beside_s: Sequence[float]) -> "Ratio":
        """Of the seconds of pairs."""
        pairs = np.asarray(own_s) / np.asarray(beside_s)
        low, middle, high = np.percentile(pairs, [25, 50, 75])
        deviation = max((high - low) / 1.349 / middle, LEAST_NOISE)
        return cls(float(middle), float(1.253 * deviation / sqrt(len(pairs))))


@dataclass(frozen=True)
class Fit:
    """A Gaussian over gains and overhead.

    Args:
        kernels: in the order of the gains.
        mean: gains, then the overhead in seconds (K + 1).
        covariance: of both.
        noise: of the model, relative (one standard deviation), beside what its parameters leave open.
        runs: how many maps it was fitted on.
        error: relative, of the prediction of a map like those (one standard deviation).
    """

    kernels: tuple[str, ...]
    mean: Floats
    covariance: Floats
    noise: float
    runs: int
    error: float | None = None

    @property
    def overhead_s(self) -> float:
        """Seconds that all maps take beside their products."""
        return float(self.mean[-1])

    def gain(self, kernel: str) -> float:
        """The factor of a kernel's products; those that no map had get the others' mean."""
        if kernel in self.kernels:
            return float(self.mean[self.kernels.index(kernel)])
        return float(self.mean[:-1].mean()) if self.kernels else 1.0

    def predict(self, sums: Mapping[str, float]) -> tuple[float, float]:
        """Seconds of a map with these sums by kernel, and their standard error."""
        seconds = self.overhead_s + sum(self.gain(k) * s for k, s in sums.items())
        row = np.array([sums.get(kernel, 0.0) for kernel in self.kernels] + [1.0])
        strangers = sum(s for k, s in sums.items() if k not in self.kernels)
        variance = row @ self.covariance @ row + (OWN_GAIN * strangers) ** 2
        variance += (self.noise * seconds) ** 2
        return seconds, sqrt(max(float(variance), 0.0))


def fit(
    maps: Sequence[Mapping[str, float]],
    measured_s: Sequence[float],
    errors: Sequence[float] | None = None,
) -> Fit:
    """Regression on relative errors, its noise estimated with it (expectation maximisation).

    Source: Bishop, Pattern Recognition and Machine Learning, eq. 3.50-3.51 and section 9.3.4; the
    model's deviation of each map is a latent variable beside the error of measuring it.

    Args:
        maps: sums by kernel, as `features` gives them.
        measured_s: what those maps took.
        errors: relative standard errors of that; none by default.
    """
    kernels = tuple(sorted({kernel for sums in maps for kernel in sums}))
    count = len(kernels)
    y = np.asarray(measured_s, dtype=np.float64)
    prior = np.zeros((count + 1, count + 1))
    prior[:count, :count] = COMMON_GAIN**2 + OWN_GAIN**2 * np.eye(count)
    prior[count, count] = float(y.mean()) ** 2 if len(y) else 1.0
    start = np.concatenate([np.ones(count), [0.0]])
    if not len(y):
        return Fit(kernels, start, prior, NOISE, 0)
    rows = np.array([[*(sums.get(k, 0.0) for k in kernels), 1.0] for sums in maps]) / y[:, None]
    own = np.square(errors) if errors is not None else np.zeros(len(y))
    inverse, noise = np.linalg.inv(prior), NOISE
    for _ in range(STEPS):
        weights = 1 / (noise**2 + own)
        covariance = np.linalg.inv(inverse + (rows.T * weights) @ rows)
        mean = covariance @ (inverse @ start + rows.T @ weights)
        left = (1 - rows @ mean) ** 2 + np.einsum("ij,jk,ik->i", rows, covariance, rows)
        share = noise**2 * weights  # what of a map's deviation is the model's, expected
        noise = sqrt(float((share**2 * left + share * own).mean()))
        noise = max(noise, LEAST_NOISE)
    spread = np.einsum("ij,jk,ik->i", rows, covariance, rows)
    error = sqrt(float((spread + noise**2).mean()))
    return Fit(kernels, mean, covariance.astype(np.float64), noise, len(y), error)
