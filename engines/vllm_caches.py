"""KV caches as vLLM keeps them: keys and values of a layer alike, some layers in FP8 and some not."""

from collections.abc import Mapping, Sequence
from typing import Any

from quantization.errors import ExportError
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout, cache_slot


def layer_caches(layout: Layout, schemes: Sequence[Scheme]) -> dict[int, str]:
    """The format of each layer's cache.

    Raises:
        ExportError: keys and values of a layer differ.
    """
    found: dict[int, str] = {}
    for unit, scheme in zip(layout.units, schemes, strict=True):
        for layer, _ in map(cache_slot, unit.sites if unit.kind == "cache" else ()):
            if found.setdefault(layer, scheme.weight) != scheme.weight:
                raise ExportError(
                    f"layer {layer} has keys and values in {found[layer]} and {scheme.weight}, and "
                    "vLLM keeps both in one; search with --engine vllm for maps that it can serve"
                )
    return found


def cache_flags(caches: Mapping[int, str]) -> str:
    """What vLLM is told of them: its FP8 has a scale of 1 where a checkpoint holds none, as here."""
    found = cache_options(caches)
    words = (f" --{name.replace('_', '-')} {_words(value)}" for name, value in found.items())
    return "".join(words)


def cache_options(caches: Mapping[int, str]) -> dict[str, Any]:
    """The same for vLLM as a library."""
    exact = [str(layer) for layer, format in caches.items() if format == FULL_PRECISION]
    if len(exact) == len(caches):
        return {}
    return {"kv_cache_dtype": "fp8", **({"kv_cache_dtype_skip_layers": exact} if exact else {})}


def _words(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)
