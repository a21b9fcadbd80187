"""The formats that a scheme can name. A new one is a file beside these and a line below."""

from quantization.formats.base import Format, Grid, Packed
from quantization.formats.bf16 import BFloat16
from quantization.formats.integer import Integer
from quantization.registry import Registry

FORMATS: Registry[Format] = Registry("format")
FORMATS.add("bf16", BFloat16())
for _bits in (2, 3, 4, 5, 6, 8):
    for _group in (32, 64, 128, None):
        for _asymmetric in (False, True):
            _integer = Integer(_bits, _group, _asymmetric)
            FORMATS.add(_integer.name, _integer)

__all__ = ["FORMATS", "Format", "Grid", "Packed"]
