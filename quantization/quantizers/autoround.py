"""AutoRound: which way each weight is rounded, learned by the sign of the gradient.

SignRound (arXiv 2309.05516, equations 3 to 5): every weight has an offset V in [-1/2, 1/2] that is
added before it is rounded, and V <- V - lr sign(dL/dV), lr falling linearly to zero. The loss is
that of the layer's output on the calibration text, tr(dW H dW^T), whose gradient is exact without
a sample; the straight-through estimator carries it over the rounding. The grid is that of the
weighted clipping search (the paper tunes the range in the same loop).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantization.formats import Format, ScalarFormat
from quantization.formats.scaled import Scaled
from quantization.quantizers.base import Quantized, Quantizer, check_finite
from quantization.quantizers.clipping import clipped_grid
from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic


@dataclass(frozen=True)
class AutoRound(Quantizer):
    """Signed-gradient rounding of scaled formats; others are rounded to nearest.

    Args:
        steps: of the descent; the first learning rate is one over it, as in the paper.
    """

    name: str = "autoround"
    steps: int = 200

    needs: frozenset[Statistic] = frozenset({"second-moment"})

    @property
    def identity(self) -> str:
        """See `Quantizer.identity`."""
        return f"{self.name}(steps={self.steps})"

    def quantize(
        self, weight: Tensor, format: Format, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        check_finite(weight)
        weight = weight.float()
        if not isinstance(format, ScalarFormat):
            return Quantized(format, *format.nearest(weight, statistics))
        grid = clipped_grid(weight, format, statistics)
        moment = statistics.second_moment
        if isinstance(format, Scaled) and moment is not None:
            low, high = format.neighbours(weight, grid)
            weight = _learn(weight, low, high, moment.to(weight), self.steps)
        return Quantized(format, format.encode(weight, grid), grid)


def _learn(weight: Tensor, low: Tensor, high: Tensor, moment: Tensor, steps: int) -> Tensor:
    """The values of least output error that the descent passes, each `low` or `high`."""
    gap = high - low
    share = torch.where(gap > 0, (weight - low) / gap.clamp(min=1e-30), 0.0)
    offset = torch.zeros_like(weight)
    best, lowest = weight, torch.full(weight.shape[:-1], torch.inf, device=weight.device)
    for step in range(steps):
        values = torch.where(share + offset > 0.5, high, low)
        gradient = (values - weight) @ moment
        loss = ((values - weight) * gradient).sum(-1)  # rows don't touch each other
        better = loss < lowest
        best = torch.where(better[..., None], values, best)
        lowest = torch.minimum(loss, lowest)
        rate = (1 - step / steps) / steps
        offset = (offset - rate * (gradient * gap).sign()).clamp_(-0.5, 0.5)
    return best
