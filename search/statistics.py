"""Means over text chunks with confidence intervals, and paired comparisons of two candidates.

numpy only: commands that answer at once use it, and importing SciPy would double their time.
"""

from dataclasses import dataclass, replace

import numpy as np

from search.problem import Floats

# Student's t, 97.5 % quantile by degrees of freedom 1 ... 30 (checked against SciPy in the tests)
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def t_975(degrees: int) -> float:
    """The 97.5 % quantile of Student's t; beyond the table by its expansion in 1 / degrees."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    return 1.959964 + 2.3723 / degrees + 2.8225 / degrees**2


def mean_interval(sums: Floats, tokens: Floats) -> Interval:
    """Mean per token over chunks, with the interval that the spread of chunk means gives.

    Args:
        sums: per-chunk sums (N).
        tokens: per-chunk token counts (N); chunks are weighted by them.
    """
    mean = float(sums.sum() / tokens.sum())
    if len(sums) < 2:
        return Interval(mean, float("nan"), float("nan"))
    residual = sums - mean * tokens
    deviation = float(np.sqrt((residual**2).sum() / (len(sums) - 1) / len(sums)))
    half = t_975(len(sums) - 1) * deviation / float(tokens.mean())
    return Interval(mean, mean - half, mean + half)


def divergence_interval(sums: Floats, tokens: Floats) -> Interval:
    """`mean_interval` of what is never below zero, as the spread of few chunks may have it."""
    found = mean_interval(sums, tokens)
    return found if not found.low < 0 else replace(found, low=min(0.0, found.mean))


def paired_difference(first: Floats, second: Floats, tokens: Floats) -> Interval:
    """Mean of `first` less `second` on the same chunks: text that is hard for both cancels."""
    return mean_interval(first - second, tokens)
