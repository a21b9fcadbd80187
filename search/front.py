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
