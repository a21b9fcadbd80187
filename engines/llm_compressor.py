"""llm-compressor's recipe: one `QuantizationModifier` whose groups are compressed-tensors'.

from llmcompressor import oneshot
oneshot(model=MODEL, recipe="recipe.yaml")
"""

from collections.abc import Mapping
from typing import Any

from engines.compressed_config import arguments_of, format_of
from engines.recipe import Recipe, canonical
from quantization.schemes import FULL_PRECISION

STAGE, MODIFIERS, MODIFIER = "quantization_stage", "quantization_modifiers", "QuantizationModifier"


class LLMCompressor(Recipe):
    """`recipe.yaml`."""

    name = "llm-compressor"
    file = "recipe.yaml"
    command = "llmcompressor.oneshot(model=MODEL, recipe='recipe.yaml')"

    def arguments(self, format: str) -> dict[str, Any]:
        """See `Recipe.arguments`."""
        return arguments_of(format)

    def format_of(self, arguments: Mapping[str, Any]) -> str:
        """See `Recipe.format_of`."""
        return canonical(format_of(arguments))

    def document(self, formats: Mapping[str, str]) -> dict[str, Any]:
        """See `Recipe.document`."""
        groups: dict[str, list[str]] = {}
        for name, format in formats.items():
            groups.setdefault(canonical(format), []).append(name)
        kept = groups.pop(FULL_PRECISION, [])
        found = {
            f"group_{number}": {"targets": names, "weights": self.arguments(format)}
            for number, (format, names) in enumerate(groups.items())
        }
        return {STAGE: {MODIFIERS: {MODIFIER: {"ignore": kept, "config_groups": found}}}}

    def formats(self, document: Mapping[str, Any]) -> dict[str, str]:
        """See `Recipe.formats`."""
        modifier = document[STAGE][MODIFIERS][MODIFIER]
        kept = dict.fromkeys(modifier["ignore"], FULL_PRECISION)
        groups = modifier["config_groups"].values()
        return kept | {
            name: self.format_of(group["weights"]) for group in groups for name in group["targets"]
        }
