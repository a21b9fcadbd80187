"""llama.cpp's presets: which type `llama-quantize ORIGINAL.gguf OUT.gguf Q4_K_M` gives which tensor.

Facts of llama.cpp's src/llama-quant.cpp (`llama_tensor_get_type`) for models without experts, up to
70B; shapes that a type doesn't divide fall back as the types themselves do. Embedding and head are
what the job has: there a preset says nothing here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engines.gguf_file import tensor_names
from quantization.units import Layout

Where = Callable[[int, int], bool]
"""Whether a rule speaks of layer i of n."""


def _all(*_: int) -> bool:
    return True


def _more(i: int, n: int) -> bool:
    """The first and last eighth, and every third between (`use_more_bits`)."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _first(count: int) -> Where:
    return lambda i, _: i < count


def _share(divisor: int) -> Where:
    return lambda i, n: i < n // divisor


@dataclass(frozen=True)
class Preset:
    """A preset.

    Args:
        base: the type of what no rule speaks of.
        rules: for tensors whose name holds the key, the first that speaks of the layer.
    """

    base: str
    rules: Mapping[str, tuple[tuple[Where, str], ...]]

    def type_of(self, name: str, n: int) -> str:
        """The type of a tensor, by its name in GGUF files, in a model of `n` layers."""
        i = int(name.split(".")[1])
        for key, rules in self.rules.items():
            if key in name:
                return next((type for where, type in rules if where(i, n)), self.base)
        return self.base


PRESETS = {
    "Q2_K": Preset("q2_K", {
        "attn_v": ((_all, "q3_K"),), "ffn_down": ((_all, "q3_K"),), "attn_output": ((_all, "q3_K"),),
    }),
    "Q3_K_M": Preset("q3_K", {
        "attn_v": ((_first(2), "q5_K"), (_all, "q4_K")),
        "ffn_down": ((_share(16), "q5_K"), (_all, "q4_K")),
        "attn_output": ((_all, "q4_K"),),
    }),
    "Q4_K_S": Preset("q4_K", {
        "attn_v": ((_first(4), "q5_K"),), "ffn_down": ((_share(8), "q5_K"),),
    }),
    "Q4_K_M": Preset("q4_K", {"attn_v": ((_more, "q6_K"),), "ffn_down": ((_more, "q6_K"),)}),
    "Q5_K_M": Preset("q5_K", {"attn_v": ((_more, "q6_K"),), "ffn_down": ((_more, "q6_K"),)}),
}  # fmt: skip


def preset_types(config: Any, layout: Layout) -> dict[str, dict[str, str]]:
    """Preset to ggml's type of each parameter of a decoder block's units.

    Args:
        config: the model's transformers configuration.
        layout: its units.
    """
    name_of, n = tensor_names(config), config.num_hidden_layers
    names = {
        site.parameter: name_of(site.parameter)
        for unit in layout.units
        if unit.layer is not None
        for site in unit.stored
    }
    found = {
        preset: {parameter: made.type_of(name, n) for parameter, name in names.items()}
        for preset, made in PRESETS.items()
    }
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if config.num_attention_heads >= 4 * keys:  # Q2_K's own rule for values that many queries share
        values = [parameter for parameter, name in names.items() if "attn_v" in name]
        found["Q2_K"] |= dict.fromkeys(values, "q4_K")
    return found
