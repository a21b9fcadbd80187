"""The formats that a scheme can name. A new one is a declaration (or a file) and a line below."""

from quantization.formats.base import Format, Grid, Packed, ScalarFormat
from quantization.formats.bf16 import BFloat16
from quantization.formats.declarations import scaled_formats
from quantization.formats.dense_and_sparse import DenseAndSparse
from quantization.formats.dialect import DialectFP4
from quantization.formats.row_tables import RowTables
from quantization.registry import Registry

FORMATS: Registry[Format] = Registry("format")
for _format in (
    BFloat16(),
    *scaled_formats(),
    *(DialectFP4(block, two_stage) for block in (16, 32, 64) for two_stage in (False, True)),
    *(RowTables(bits) for bits in (3, 4)),
    *(DenseAndSparse(RowTables(bits), percent) for bits in (3, 4) for percent in (0.05, 0.45)),
):
    FORMATS.add(_format.name, _format)

__all__ = ["FORMATS", "Format", "Grid", "Packed", "ScalarFormat"]
