"""The quantizers that a job can name. A new one is a file beside these and a line below."""

from quantization.quantizers.base import Quantized, Quantizer
from quantization.quantizers.rtn import RoundToNearest
from quantization.registry import Registry

QUANTIZERS: Registry[Quantizer] = Registry("quantizer")
QUANTIZERS.add("rtn", RoundToNearest())

__all__ = ["QUANTIZERS", "Quantized", "Quantizer"]
