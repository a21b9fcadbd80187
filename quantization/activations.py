"""Formats of activations: a row of a tensor is a token, quantized as it comes (dynamically).

`int8-token` has a scale for each token and is `int8-channel` of a weight's rows; formats with groups
or blocks along the row are called alike for both: `mxfp4`, `nvfp4`, `int8-g128`.
"""

from torch import Tensor

from quantization.formats import FORMATS, Format
from quantization.quantizers import QUANTIZERS
from quantization.registry import Registry

TOKEN, CHANNEL = "-token", "-channel"
ACTIVATIONS: Registry[Format] = Registry("activation format")


def _register() -> None:
    for name in FORMATS:
        format = FORMATS[name]
        if format.family in ("integer", "float", "microscaling") and "-b128" not in name:
            token = name.replace(CHANNEL, TOKEN)
            if token != name or not name.endswith(("fp8-e4m3", "fp8-e5m2")):
                ACTIVATIONS.add(token, format)


_register()


def rounded(rows: Tensor, format: Format) -> Tensor:
    """`rows` (... x width) as the format gives them back, each row by itself, in their own type.

    Raises:
        QuantizationError: NaN or infinity, or what the format can't hold.
    """
    flat = rows.reshape(-1, rows.shape[-1]).float()
    return QUANTIZERS["rtn"].quantize(flat, format).dequantize().view(rows.shape).to(rows.dtype)
