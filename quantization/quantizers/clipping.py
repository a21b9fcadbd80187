"""Round to nearest with a clipping search: each block's reach is shrunk to where it errs least.

A block's few largest values set its scale; cutting them a little often costs less than the finer
steps gain. The search tries a grid of shrinkages for each block and keeps the one of least
sum c_j (w - Q(w))^2, with c the second moment of the inputs (`weighted`) or ones (MSE). The same
grid is what GPTQ and AutoRound start from.
"""

import torch
from torch import Tensor

from quantization.formats import Format, Grid, ScalarFormat
from quantization.formats.scaled import Scaled
from quantization.formats.scales import PowerOfTwo
from quantization.quantizers.base import Quantized, Quantizer, check_finite
from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic

STEPS = tuple(1 - 0.04 * i for i in range(16))  # down to 0.4: beyond it nothing was ever chosen
OCTAVES = (1.0, 2.0, 0.5)  # a power of two has no steps between; as fitted where all overflow


class ClippingSearch(Quantizer):
    """Round to nearest on the best of some shrunken grids.

    Args:
        weighted: by the input's second moment, which needs calibration.
    """

    def __init__(self, *, weighted: bool) -> None:
        self.name = "rtn-weighted" if weighted else "rtn-mse"
        if weighted:
            self.needs: frozenset[Statistic] = frozenset({"second-moment"})

    def quantize(
        self, weight: Tensor, format: Format, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        check_finite(weight)
        weight = weight.float()
        if not isinstance(format, ScalarFormat):
            return Quantized(format, *format.nearest(weight, statistics))
        grid = (clipped_grid if self.needs else _mse_grid)(weight, format, statistics)
        return Quantized(format, format.encode(weight, grid), grid)


def clipped_grid(weight: Tensor, format: ScalarFormat, statistics: SiteStatistics) -> Grid:
    """The grid of least weighted squared error among those of shrunken blocks.

    Formats without scales are fitted as they are; mixtures part by part.
    """
    if not isinstance(format, Scaled):
        return format.fit_parts(weight, statistics, clipped_grid)
    cost = statistics.importance
    return _searched(weight, format, None if cost is None else cost.to(weight)[..., None, :])


def _mse_grid(weight: Tensor, format: ScalarFormat, statistics: SiteStatistics) -> Grid:
    """The same of least squared error; statistics only place a mixture's parts."""
    if not isinstance(format, Scaled):
        return format.fit_parts(weight, statistics, _mse_grid)
    return _searched(weight, format, None)


def _searched(weight: Tensor, format: Scaled, cost: Tensor | None) -> Grid:
    best: Tensor | None = None
    shrink = torch.ones(())
    for step in OCTAVES if isinstance(format.scale, PowerOfTwo) else STEPS:
        grid = format.fit(weight, shrink=step)
        error = (format.decode(format.encode(weight, grid), grid) - weight).square_()
        errors = format.block_sums(error if cost is None else error * cost)
        if best is None:
            best, shrink = errors, torch.full_like(errors, step)
        else:
            shrink = torch.where(errors < best, step, shrink)
            best = torch.minimum(errors, best)
    return format.fit(weight, shrink=shrink)
