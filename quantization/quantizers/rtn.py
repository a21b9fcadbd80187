"""Round to nearest: scales from each group's extremes, each value to its nearest code."""

from torch import Tensor

from quantization.formats import Format
from quantization.quantizers.base import Quantized, Quantizer, check_finite
from quantization.statistics import NOTHING_KNOWN, SiteStatistics


class RoundToNearest(Quantizer):
    """The baseline that needs no data. Template for a quantizer."""

    name = "rtn"

    def quantize(
        self, weight: Tensor, format: Format, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        check_finite(weight)
        return Quantized(format, *format.nearest(weight.float(), statistics))
