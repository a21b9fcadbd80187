"""The quantizers that a job can name. A new one is a file beside these and a line below."""

from quantization.quantizers.autoround import AutoRound
from quantization.quantizers.base import Quantized, Quantizer, needs, rendering
from quantization.quantizers.clipping import ClippingSearch
from quantization.quantizers.gptq import GPTQ
from quantization.quantizers.hqq import HQQ
from quantization.quantizers.rtn import RoundToNearest
from quantization.quantizers.yaqa import YAQA
from quantization.registry import Registry

QUANTIZERS: Registry[Quantizer] = Registry("quantizer")
for _quantizer in (
    RoundToNearest(),
    ClippingSearch(weighted=False),
    ClippingSearch(weighted=True),
    GPTQ(),
    HQQ(),
    AutoRound(),
    YAQA(),
):
    QUANTIZERS.add(_quantizer.name, _quantizer)

__all__ = ["QUANTIZERS", "Quantized", "Quantizer", "needs", "rendering"]
