"""From raw scores to nats per token: a gain fitted on measured maps, stored with its residual."""

from dataclasses import dataclass

import numpy as np

from search.problem import Floats


@dataclass(frozen=True)
class Calibration:
    """predicted KL = gain x raw score.

    Args:
        gain: nats per token and unit of raw score.
        residual: standard deviation of log(measured / predicted); 0.7 is a factor of two.
        maps: how many measured maps it was fitted on.
    """

    gain: float
    residual: float
    maps: int

    def predict(self, raw: float) -> float:
        """Nats per token."""
        return self.gain * raw


def fit_gain(raw: Floats, measured: Floats, floor: float = 0.0) -> Calibration:
    """Fit the gain in the logarithm, because losses span four orders of magnitude.

    Args:
        raw: raw scores of measured maps (N).
        measured: their KL in nats per token (N).
        floor: the arithmetic's noise; maps that measure below it teach nothing.
    """
    usable = (raw > 0) & (measured > max(floor, 0.0)) & np.isfinite(measured)
    if not usable.any():
        return Calibration(1.0, float("nan"), 0)
    ratios = np.log(measured[usable]) - np.log(raw[usable])
    gain = float(np.exp(np.median(ratios)))  # the median: 2-bit maps saturate and would pull it
    residual = float(np.sqrt(np.mean((ratios - np.log(gain)) ** 2)))
    return Calibration(gain, residual, int(usable.sum()))
