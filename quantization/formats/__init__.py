"""The formats that a scheme can name. A new one is a declaration (or a file) and a line below."""

from quantization.formats.base import Format, Grid, Packed, ScalarFormat
from quantization.formats.bf16 import BFloat16
from quantization.formats.declarations import scaled_formats
from quantization.registry import Registry

FORMATS: Registry[Format] = Registry("format")
for _format in (BFloat16(), *scaled_formats()):
    FORMATS.add(_format.name, _format)

__all__ = ["FORMATS", "Format", "Grid", "Packed", "ScalarFormat"]
