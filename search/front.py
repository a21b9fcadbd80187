"""Fronts: which of the measured candidates no other one dominates."""

import numpy as np
from numpy.typing import NDArray

from search.problem import Floats, Mask


def non_dominated(cost: NDArray[np.generic], loss: Floats) -> Mask:
    """Whether each of N points has no other with less or equal cost and loss, one strictly less.

    Of several equal points all stay. NaN loses against everything.
    """
    cost = np.asarray(cost, dtype=np.float64)
    loss = np.where(np.isnan(loss), np.inf, loss)
    keep = np.isfinite(loss)
    for i in range(len(loss)):
        no_worse = (cost <= cost[i]) & (loss <= loss[i])
        better = (cost < cost[i]) | (loss < loss[i])
        keep[i] &= not bool((no_worse & better).any())
    return keep


def hypervolume(cost: NDArray[np.generic], loss: Floats, reference: tuple[float, float]) -> float:
    """The area that a front dominates, up to a reference point (cost, loss); two objectives.

    (Zitzler and Thiele 1998.) Points beyond the reference count nothing.
    """
    costs: Floats = np.asarray(cost, dtype=np.float64)
    inside = (costs < reference[0]) & (loss < reference[1])
    order = np.argsort(costs[inside], kind="stable")
    widths = np.diff([*costs[inside][order], reference[0]])
    lowest = np.minimum.accumulate(loss[inside][order])
    return float(widths @ (reference[1] - lowest)) if len(lowest) else 0.0
