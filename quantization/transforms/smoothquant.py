"""SmoothQuant: the outliers of activations are moved into the weights, halfway.

With a migration strength a (SmoothQuant, arXiv 2211.10438, equation 4), x_j the inputs of channel j
and w_j the weights that read it:

    s_j = max|x_j|^a / max|w_j|^(1 - a)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantization.formats import Format
from quantization.statistics import SiteStatistics
from quantization.transforms.base import Transform, floored, magnitude
from quantization.transforms.folds import Fold


@dataclass(frozen=True)
class SmoothQuant(Transform):
    """Smoothing of every fold; the paper smooths only those behind norms.

    The root of E[x^2] stands for max|x|, which calibration doesn't keep.

    Args:
        strength: a; 0.5 is the paper's default.
    """

    name: str = "smoothquant"
    strength: float = 0.5

    @property
    def identity(self) -> str:
        """See `Transform.identity`."""
        return f"{self.name}-{self.strength:g}"

    def scale(
        self,
        fold: Fold,
        weights: Sequence[Tensor],
        statistics: Sequence[SiteStatistics],
        format: Format | None,
    ) -> Tensor:
        """See `Transform.scale`."""
        largest = torch.cat([fold.pooled(weight.abs().amax(-2)) for weight in weights]).amax(0)
        inputs = magnitude(fold, statistics)
        return inputs**self.strength / floored(largest) ** (1 - self.strength)
