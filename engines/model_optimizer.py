"""NVIDIA Model-Optimizer's `quant_cfg`: a weight quantizer by layer.

import modelopt.torch.quantization as mtq
mtq.quantize(model, yaml.safe_load(open("quant_cfg.yaml")), forward_loop)
"""

from collections.abc import Mapping
from typing import Any

from engines.recipe import Recipe, matched
from engines.regular import integer, integer_named
from quantization.errors import ExportError
from quantization.schemes import FULL_PRECISION

QUANTIZER = ".weight_quantizer"
COLUMNS = -1
"""Which dimension of a weight blocks run along."""
OFF = {"enable": False}
FLOATS: dict[str, dict[str, Any]] = {
    "fp8-e4m3": {"num_bits": [4, 3], "axis": None, "enable": True},
    "fp8-e4m3-channel": {"num_bits": [4, 3], "axis": 0, "enable": True},
    "nvfp4": {
        "num_bits": [2, 1],
        "block_sizes": {COLUMNS: 16, "type": "dynamic", "scale_bits": [4, 3]},
        "axis": None,
        "enable": True,
    },
}


class ModelOptimizer(Recipe):
    """`quant_cfg.yaml`."""

    name = "modelopt"
    file = "quant_cfg.yaml"
    command = "mtq.quantize(model, yaml.safe_load(open('quant_cfg.yaml')), forward_loop)"

    def arguments(self, format: str) -> dict[str, Any]:
        """See `Recipe.arguments`."""
        if format == FULL_PRECISION:
            return dict(OFF)
        if format in FLOATS:
            return dict(FLOATS[format])
        made = integer(format)
        if made.asymmetric:
            raise ExportError(f"Model-Optimizer's integers have no zero points, as {format} has")
        if made.columns is None:
            return {"num_bits": made.element.bits, "axis": 0, "enable": True}
        blocks = {COLUMNS: made.columns}
        return {"num_bits": made.element.bits, "block_sizes": blocks, "enable": True}

    def format_of(self, arguments: Mapping[str, Any]) -> str:
        """See `Recipe.format_of`."""
        if not arguments.get("enable", True):
            return FULL_PRECISION
        bits = arguments["num_bits"]
        if not isinstance(bits, int):
            return matched(arguments, FLOATS)
        blocks = arguments.get("block_sizes") or {}
        return integer_named(bits, blocks.get(COLUMNS))

    def document(self, formats: Mapping[str, str]) -> dict[str, Any]:
        """See `Recipe.document`."""
        layers = {name + QUANTIZER: self.arguments(format) for name, format in formats.items()}
        return {"quant_cfg": {"default": dict(OFF), **layers}, "algorithm": "max"}

    def formats(self, document: Mapping[str, Any]) -> dict[str, str]:
        """See `Recipe.formats`."""
        return {
            name.removesuffix(QUANTIZER): self.format_of(arguments)
            for name, arguments in document["quant_cfg"].items()
            if name.endswith(QUANTIZER)
        }
