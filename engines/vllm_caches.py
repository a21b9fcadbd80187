"""KV caches as vLLM keeps them: keys and values of a layer alike, some layers in FP8 and some not."""

from collections.abc import Mapping, Sequence

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
    exact = [str(layer) for layer, format in caches.items() if format == FULL_PRECISION]
    if len(exact) == len(caches):
        return ""
    skipped = f" --kv-cache-dtype-skip-layers {' '.join(exact)}" if exact else ""
    return f" --kv-cache-dtype fp8{skipped}"
