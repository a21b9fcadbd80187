"""The audit of predictions: do scores rank maps as measurements do, and do they add up?

Legend: N measured maps, U units, S schemes. Arrays in, plain numbers out.

Ranks are what an allocator needs. Over maps of many sizes the number of bits alone ranks well, so
the harder question is asked too: at equal size. Null arms show what a figure is worth: the same
table with its units shuffled, and with its order turned round, must do worse.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau, rankdata, spearmanr

from search.calibration import Calibration, fit_gain
from search.problem import Floats, Ints, Mask
from search.statistics import Interval

RESAMPLES = 1000
SHUFFLES = 20


@dataclass(frozen=True)
class Maps:
    """Measured maps.

    Args:
        choices: N x U columns of schemes.
        kl: measured, nats per token (N).
        bits: average bits (N).
        groups: the name of the set that each was drawn for (N); `EQUAL` says which have one size.
    """

    choices: Ints
    kl: Floats
    bits: Floats
    groups: Sequence[str]

    def of(self, group: str) -> "Maps":
        """One set."""
        at = [i for i, name in enumerate(self.groups) if name == group]
        return Maps(self.choices[at], self.kl[at], self.bits[at], [group] * len(at))


FLIPS, MIXED, EQUAL, EQUAL_NEAR = "flips", "mixed", "equal", "equal near"
"""Single flips; maps of all sizes; of one size (`equal 3.25`), also near its uniform map."""


@dataclass(frozen=True)
class Verdict:
    """How well an estimator predicts.

    Args:
        spearman: over maps of all sizes, with its 95 % interval.
        kendall: the same maps' tau-b.
        equal_bits: Spearman within each set of equal size.
        flips: Spearman over single flips above the noise floor, None with fewer than five.
        calibration: the gain to nats and its residual, over all mixed maps.
        residual_by_bits: mean log(measured / predicted) of maps by whole average bits.
    """

    spearman: Interval
    kendall: float
    equal_bits: Mapping[str, Interval]
    flips: Interval | None
    calibration: Calibration
    residual_by_bits: Mapping[str, float]

    @property
    def spearman_equal_bits(self) -> float | None:
        """The mean over the sets; None without any."""
        values = [interval.mean for interval in self.equal_bits.values()]
        return float(np.mean(values)) if values else None

    @property
    def merit(self) -> float:
        """What estimators are ranked by: equal size where it was asked, else all sizes."""
        equal = self.spearman_equal_bits
        return self.spearman.mean if equal is None else equal


def totals(loss: Floats, choices: Ints) -> Floats:
    """Predicted sums of maps (N) under a table U x S; what isn't offered counts nothing."""
    table = np.nan_to_num(loss)
    return np.asarray(table[np.arange(len(table))[None], choices].sum(axis=1))


def judge(loss: Floats, maps: Maps, floor: float = 0.0, seed: int = 0) -> Verdict:
    """Compare an estimator's table with measurements.

    Args:
        loss: U x S raw scores.
        maps: measured maps of all sets.
        floor: the arithmetic's noise in nats per token; flips below it have no order.
        seed: of the bootstrap over maps.
    """
    mixed = maps.of(MIXED)
    predicted = totals(loss, mixed.choices)
    equal = {g: maps.of(g) for g in sorted({g for g in maps.groups if g.startswith(EQUAL)})}
    flips = maps.of(FLIPS)
    clear = flips.kl > 2 * floor
    fit = fit_gain(predicted, mixed.kl, 2 * floor)
    return Verdict(
        spearman=rank_interval(predicted, mixed.kl, seed),
        kendall=float(kendalltau(predicted, mixed.kl).statistic) if len(mixed.kl) > 1 else np.nan,
        equal_bits={
            g.removeprefix(EQUAL).strip(): rank_interval(totals(loss, m.choices), m.kl, seed)
            for g, m in equal.items()
        },
        flips=rank_interval(totals(loss, flips.choices)[clear], flips.kl[clear], seed)
        if clear.sum() >= 5
        else None,
        calibration=fit,
        residual_by_bits=_by_bits(fit, predicted, mixed),
    )


def rank_interval(predicted: Floats, measured: Floats, seed: int = 0) -> Interval:
    """Spearman's rho with a 95 % bootstrap interval over maps; NaN where either is constant."""
    count = len(measured)
    if count < 3 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        return Interval(np.nan, np.nan, np.nan)
    generator = np.random.default_rng(seed)
    draws = generator.integers(count, size=(RESAMPLES, count))
    ranks = [rankdata(values[draws], axis=1) for values in (predicted, measured)]
    first, second = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    norms = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    rhos = (first * second).sum(axis=1)[norms > 0] / norms[norms > 0]
    low, high = np.quantile(rhos, [0.025, 0.975])
    return Interval(float(spearmanr(predicted, measured).statistic), float(low), float(high))


def shuffled(loss: Floats, offered: Mask, generator: np.random.Generator) -> Floats:
    """The table with the scores of units that have the same menu given to one another."""
    result = loss.copy()
    menus: dict[bytes, list[int]] = {}
    for u, row in enumerate(offered):
        menus.setdefault(row.tobytes(), []).append(u)
    for units in menus.values():
        result[units] = loss[generator.permutation(units)]
    return result


def inverse(loss: Floats, offered: Mask) -> Floats:
    """The table with sensitive units made insensitive: each row times the inverse of its square.

    Within a unit fewer bits still cost more; between units the order is turned round.
    """
    rows = np.where(offered, np.abs(np.nan_to_num(loss)), 0.0).sum(axis=1, keepdims=True)
    scale = np.where(rows > 0, rows, 1.0)
    return np.asarray(loss / scale**2)


def null_arms(
    loss: Floats, maps: Maps, offered: Mask, bits_alone: Floats, seed: int = 0
) -> dict[str, float]:
    """Mean Spearman at equal size (at all sizes without such sets) of what should fail.

    `bits_alone` is a table that knows nothing but sizes and bits.
    """
    generator = np.random.default_rng(seed)
    tables = [shuffled(loss, offered, generator) for _ in range(SHUFFLES)]
    return {
        "shuffled": float(np.mean([_merit(table, maps) for table in tables])),
        "inverse": _merit(inverse(loss, offered), maps),
        "bits alone": _merit(bits_alone, maps),
    }


def _merit(loss: Floats, maps: Maps) -> float:
    groups = sorted({g for g in maps.groups if g.startswith(EQUAL)}) or [MIXED]
    found = []
    for group in groups:
        own = maps.of(group)
        predicted = totals(loss, own.choices)
        if len(own.kl) > 2 and np.ptp(predicted) > 0:
            found.append(float(spearmanr(predicted, own.kl).statistic))
    return float(np.mean(found)) if found else np.nan


def _by_bits(fit: Calibration, predicted: Floats, maps: Maps) -> dict[str, float]:
    usable = (predicted > 0) & (maps.kl > 0)
    logs = np.log(maps.kl[usable]) - np.log(fit.gain * predicted[usable])
    whole = np.floor(maps.bits[usable]).astype(int)
    return {f"{b} to {b + 1}": float(logs[whole == b].mean()) for b in sorted(set(whole.tolist()))}
