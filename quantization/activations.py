"""Formats of activations and KV caches: a row is a token's, quantized as it comes (dynamically).

`int8-token` has a scale for each token and is `int8-channel` of a weight's rows; formats with groups
or blocks along the row are called alike for both: `mxfp4`, `int8-g128`, `dialectfp4-b32-online`.
"""

from torch import Tensor

from quantization.formats import FORMATS, BFloat16, Format
from quantization.formats.dialect import DialectFP4
from quantization.formats.gguf import TYPES, GGUFFormat
from quantization.formats.scaled import Scaled
from quantization.formats.scales import TensorScaled
from quantization.quantizers import QUANTIZERS
from quantization.registry import Registry

TOKEN, CHANNEL = "-token", "-channel"
ACTIVATIONS: Registry[Format] = Registry("activation format")


def by_rows(format: Format) -> bool:
    """Whether it rounds each row by itself, knowing nothing else.

    Else the past of a token would depend on its future: scales of whole tensors, tiles of several
    rows, columns that are picked among all rows, importance.
    """
    if isinstance(format, Scaled):
        return format.rows == 1 and not isinstance(format.scale, TensorScaled)
    if isinstance(format, GGUFFormat):
        return TYPES[format.type].imatrix != "required"
    return isinstance(format, BFloat16 | DialectFP4)


def _register() -> None:
    for name in FORMATS:
        format = FORMATS[name]
        if isinstance(format, Scaled | DialectFP4) and by_rows(format):
            ACTIVATIONS.add(name.replace(CHANNEL, TOKEN), format)


_register()


def rounded(rows: Tensor, format: Format) -> Tensor:
    """`rows` (... x width) as the format gives them back, in their own type, where they are.

    Raises:
        QuantizationError: NaN or infinity, or what the format can't hold.
    """
    flat = rows.reshape(-1, rows.shape[-1]).float()
    return QUANTIZERS["rtn"].quantize(flat, format).dequantize().view(rows.shape).to(rows)
