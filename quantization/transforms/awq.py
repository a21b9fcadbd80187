"""AWQ: channels of large inputs are scaled up before rounding, by a power found on a grid.

The scale is s = m^a with m the magnitude of a channel's inputs (AWQ, arXiv 2306.00978, equation 5),
divided by sqrt(max s min s) as the authors' code does. For each fold the a is chosen that errs
least in what its sites compute, with dW = Q(W diag(s)) diag(s)^-1 - W and H = E[x^T x]:

    sum over sites of tr(dW H dW^T)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantization.errors import QuantizationError
from quantization.formats import Format
from quantization.quantizers.rtn import RoundToNearest
from quantization.statistics import NOTHING_KNOWN, SiteStatistics
from quantization.transforms.base import Transform, magnitude
from quantization.transforms.folds import Fold


@dataclass(frozen=True)
class AWQ(Transform):
    """Activation-aware scaling, tuned to round-to-nearest in one format.

    Two departures: m is the root of E[x^2] where the paper takes the mean of |x|, and errors are
    those of single products where its code runs the attention or MLP around them. A power of zero
    is tried first, so no fold errs more than without it. The experts of a layer share their power,
    and each counts the same.

    Args:
        steps: how many powers are tried, from 0 in steps of 1 / steps; 20 as in the authors' code.
    """

    name: str = "awq"
    steps: int = 20

    tuned = True

    @property
    def identity(self) -> str:
        """See `Transform.identity`."""
        return f"{self.name}-{self.steps}"

    def scale(
        self,
        fold: Fold,
        weights: Sequence[Tensor],
        statistics: Sequence[SiteStatistics],
        format: Format | None,
    ) -> Tensor:
        """See `Transform.scale`."""
        assert format is not None
        size = magnitude(fold, statistics)
        best = torch.ones_like(size)
        least = fold_error(fold, best, weights, statistics, format)
        for step in range(1, self.steps):
            scale = size ** (step / self.steps)
            scale = scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt()
            try:
                error = fold_error(fold, scale, weights, statistics, format)
            except QuantizationError:
                continue  # it takes a weight out of the format's range
            if error < least:
                best, least = scale, error
        return best


def fold_error(
    fold: Fold,
    scale: Tensor,
    weights: Sequence[Tensor],
    statistics: Sequence[SiteStatistics],
    format: Format,
) -> float:
    """The summed squared output error of a fold's sites, rounded to nearest under a scale.

    Sites that the format doesn't apply to add nothing.

    Raises:
        QuantizationError: the format can't hold the scaled weights.
    """
    columns, rounding, total = fold.columns(scale), RoundToNearest(), 0.0
    spread = columns.unsqueeze(-2)
    for weight, known in zip(weights, statistics, strict=True):
        if known.second_moment is None or format.refusal(tuple(weight.shape)):
            continue
        inputs = _scaled(known, columns) if "second-moment" in format.needs else NOTHING_KNOWN
        rounded = rounding.quantize(weight * spread, format, inputs).dequantize().to(weight)
        error = rounded.div_(spread).sub_(weight)
        total += float(((error @ known.second_moment.to(error)) * error).sum(dtype=torch.float64))
    return total


def _scaled(known: SiteStatistics, columns: Tensor) -> SiteStatistics:
    """What is known of inputs once they are divided by a scale."""
    assert known.second_moment is not None
    moment = known.second_moment / (columns.unsqueeze(-1) * columns.unsqueeze(-2))
    return SiteStatistics(moment, moment.diagonal(dim1=-2, dim2=-1).contiguous())
