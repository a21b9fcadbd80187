"""AutoRound's `layer_config`: bits, group and data type by layer.

from auto_round import AutoRound
AutoRound(model, layer_config=yaml.safe_load(open("layer_config.yaml"))).quantize_and_save(...)
"""

from collections.abc import Mapping
from typing import Any

from engines.recipe import Recipe, matched
from engines.regular import bits_and_group, integer_named
from quantization.schemes import FULL_PRECISION

FULL = {"bits": 16, "data_type": "fp"}
FLOATS: dict[str, dict[str, Any]] = {
    "mxfp4": {"bits": 4, "group_size": 32, "sym": True, "data_type": "mx_fp"},
    "mxfp8": {"bits": 8, "group_size": 32, "sym": True, "data_type": "mx_fp"},
    "nvfp4": {"bits": 4, "group_size": 16, "sym": True, "data_type": "nv_fp"},
    "fp8-e4m3-channel": {"bits": 8, "group_size": -1, "sym": True, "data_type": "fp"},
}


class AutoRound(Recipe):
    """`layer_config.yaml`."""

    name = "auto-round"
    file = "layer_config.yaml"
    command = "auto_round.AutoRound(model, layer_config=yaml.safe_load(open('layer_config.yaml')))"

    def arguments(self, format: str) -> dict[str, Any]:
        """See `Recipe.arguments`."""
        if format == FULL_PRECISION:
            return dict(FULL)
        if format in FLOATS:
            return dict(FLOATS[format])
        return {**bits_and_group(format), "data_type": "int"}

    def format_of(self, arguments: Mapping[str, Any]) -> str:
        """See `Recipe.format_of`."""
        if arguments.get("bits") == FULL["bits"]:
            return FULL_PRECISION
        if arguments.get("data_type") != "int":
            return matched(arguments, FLOATS)
        asymmetric = not arguments.get("sym", True)
        return integer_named(arguments["bits"], arguments["group_size"], asymmetric=asymmetric)

    def document(self, formats: Mapping[str, str]) -> dict[str, Any]:
        """See `Recipe.document`."""
        return {name: self.arguments(format) for name, format in formats.items()}

    def formats(self, document: Mapping[str, Any]) -> dict[str, str]:
        """See `Recipe.formats`."""
        return {name: self.format_of(arguments) for name, arguments in document.items()}
