"""The formats that a scheme can name. A new one is a declaration (or a file) and a line below."""

from quantization.formats.base import Format, Grid, Packed, ScalarFormat
from quantization.formats.bf16 import BFloat16
from quantization.formats.channel_mixtures import channel_mixtures
from quantization.formats.declarations import scaled_formats
from quantization.formats.dense_and_sparse import DenseAndSparse
from quantization.formats.dialect import DialectFP4
from quantization.formats.fgmp import FGMP
from quantization.formats.gguf import gguf_formats
from quantization.formats.rotated import Rotated
from quantization.formats.row_tables import RowTables
from quantization.formats.trellis import Trellis
from quantization.registry import Registry

FORMATS: Registry[Format] = Registry("format")


def _register() -> None:
    scalar: dict[str, ScalarFormat] = {
        format.name: format
        for format in (
            BFloat16(),
            *scaled_formats(),
            *(DialectFP4(block, online) for online in (False, True) for block in (16, 32, 64)),
            *(RowTables(bits) for bits in (3, 4)),
        )
    }
    for percent in (0.05, 0.45):
        for dense in ("squeezellm3", "squeezellm4", "int3-g64", "int4-g64"):
            sparse = DenseAndSparse(scalar[dense], percent)
            scalar[sparse.name] = sparse
    mixtures = (
        *channel_mixtures(scalar),
        *(FGMP(percent, scalar["nvfp4"], scalar["fp8-e4m3"]) for percent in (10, 30, 50, 70, 90)),
    )
    trellises = (Rotated(Trellis(bits)) for bits in range(2, 7))
    for format in (*scalar.values(), *mixtures, *trellises, *gguf_formats()):
        FORMATS.add(format.name, format)


_register()

__all__ = ["FORMATS", "BFloat16", "Format", "Grid", "Packed", "Rotated", "ScalarFormat"]
