"""Correction of a table of scores by the measured KL of whole maps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PENALTY = 0.05
"""Of squared logarithms of factors, in units of a squared logarithm of a map's KL (`corrected`)."""


@dataclass(frozen=True)
class MeasuredMap:
    """A whole map that an estimator has measured.

    Args:
        choice: the column of each unit's scheme.
        kl: nats per token.
        chunk: the number of the chunk that it was measured on.
    """

    choice: tuple[int, ...]
    kl: float
    chunk: int


def corrected(table: Floats, maps: Sequence[MeasuredMap]) -> Floats:
    """The table with each unit's scores times a factor, fitted to the measured KL of whole maps.

        log KL_n = a_chunk(n) + b log sum_u e^(theta_u) table[u, choice_n(u)]

    Least squares with `PENALTY` |theta|^2, which keeps a unit that the maps say little of at its
    score; b < 1 where losses saturate. Where no scheme of a map costs anything it is left out.
    """
    choices = np.array([measured.choice for measured in maps])
    scores = np.nan_to_num(table).clip(0)[np.arange(len(table))[None], choices]  # N x U
    usable = scores.sum(axis=1) > 0
    kl = np.array([max(measured.kl, 1e-9) for measured in maps])[usable]
    scores, logs = scores[usable], np.log(kl)
    _, chunk = np.unique(
        [m.chunk for m, u in zip(maps, usable, strict=True) if u], return_inverse=True
    )
    units, chunks = scores.shape[1], int(chunk.max(initial=-1)) + 1

    def loss(x: Floats) -> tuple[float, Floats]:
        theta, slope, level = x[:units], x[units], x[units + 1 :]
        parts = scores * np.exp(theta)
        total = parts.sum(axis=1)
        residual = level[chunk] + slope * np.log(total) - logs
        by_theta = 2 * (residual * slope / total) @ parts + 2 * PENALTY * theta
        by_slope = 2 * residual @ np.log(total)
        by_level = 2 * np.bincount(chunk, residual, minlength=chunks)
        value = residual @ residual + PENALTY * theta @ theta
        return float(value), np.concatenate([by_theta, [by_slope], by_level])

    from scipy.optimize import minimize  # slow to import

    start = np.concatenate([np.zeros(units), [1.0], np.zeros(chunks)])
    fitted = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    return np.asarray(table * np.exp(fitted.x[:units])[:, None])
