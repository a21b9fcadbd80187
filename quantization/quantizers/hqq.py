"""HQQ: half-quadratic quantization, which needs no data (mobiusml.github.io/hqq_blog).

Minimises sum |w - Q(w)|^p with p < 1, which lets a few weights err so that most don't, by splitting
the error off as W_e and alternating between a shrinkage of it and the zero points (the scales, where
a format has no real-valued zero points) in closed form:

    W_e = S shrink_p((W - Q(W)) / S, beta)     Z = mean(q - (W - W_e) / S)     S = <q, W - W_e> / <q, q>

The shrinkage is in units of the scale (in the weights' own, as published, beta = 10 cuts every error
of a usual layer to zero).
"""

import torch
from torch import Tensor

from quantization.formats import Format, Grid, ScalarFormat
from quantization.formats.scaled import Scaled
from quantization.quantizers.base import Quantized, Quantizer, check_finite
from quantization.statistics import NOTHING_KNOWN, SiteStatistics

NORM = 0.7
BETA, GROWTH = 10.0, 1.01  # of the published implementation, as are the steps
STEPS = 20


class HQQ(Quantizer):
    """Half-quadratic search for zero points or scales; other formats are rounded to nearest."""

    name = "hqq"

    def quantize(
        self, weight: Tensor, format: Format, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        check_finite(weight)
        weight = weight.float()
        if not isinstance(format, ScalarFormat):
            return Quantized(format, *format.nearest(weight, statistics))
        grid = half_quadratic_grid(weight, format, statistics)
        return Quantized(format, format.encode(weight, grid), grid)


def half_quadratic_grid(weight: Tensor, format: ScalarFormat, statistics: SiteStatistics) -> Grid:
    """The best grid of the iteration, block by block; the first one where none is better."""
    if not isinstance(format, Scaled):
        return format.fit_parts(weight, statistics, half_quadratic_grid)
    grid = format.fit(weight)
    real = format.real_zeros  # whole zero points would be rounded back to where they were
    ideal = grid["zeros"].float() if real else torch.ones_like(format.block_sums(weight))
    sizes = format.block_sums(torch.ones_like(weight))
    best, lowest, beta = ideal, None, BETA
    for _ in range(STEPS):
        codes = format.encode(weight, grid)
        error = weight - format.decode(codes, grid)
        loss = format.block_sums(error.abs() ** NORM)
        best = ideal if lowest is None else torch.where(loss < lowest, ideal, best)
        lowest = loss if lowest is None else torch.minimum(loss, lowest)
        scales = format.scale.load(grid)
        steps = format.spread(scales, weight)
        target = weight - _shrink(error / steps, beta) * steps
        if real:
            # S (q - Z) should be the target: the mean over the block of q - target / S
            offset = format.decode(codes, grid) - target
            ideal = ideal + format.block_sums(offset) / sizes / scales
        else:
            values = format.decode(codes, grid)
            over = format.block_sums(values.square()).clamp(min=1e-30)
            ideal = ideal * (format.block_sums(values * target) / over).clamp(0.5, 2)
        grid = _with(format, weight, grid, ideal)
        beta *= GROWTH
    return _with(format, weight, grid, best)


def _with(format: Scaled, weight: Tensor, grid: Grid, ideal: Tensor) -> Grid:
    """The grid at other zero points, or at scales shrunken to another share of the reach."""
    return format.with_zeros(grid, ideal) if format.real_zeros else format.fit(weight, shrink=ideal)


def _shrink(x: Tensor, beta: float) -> Tensor:
    """The generalised soft threshold of the l_p norm."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-12) ** (NORM - 1) / beta).clamp_(min=0)
