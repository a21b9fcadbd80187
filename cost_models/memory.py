"""Whole-model memory: weights plus the KV cache of a workload. No torch: queries use it."""

from dataclasses import dataclass

from quantization.units import Layout

RESOURCE = "memory_bytes"
CACHE_ELEMENT_BYTES = 2  # bf16


@dataclass(frozen=True)
class Workload:
    """What the model has to hold at once.

    Args:
        batch: sequences side by side.
        context: tokens kept for each sequence.
    """

    batch: int = 1
    context: int = 4096


def kv_cache_bytes(layout: Layout, workload: Workload) -> int:
    """Bytes of the KV cache at full context, sliding windows respected."""
    elements = sum(
        layer.elements * min(workload.context, layer.window or workload.context)
        for layer in layout.cache
    )
    return CACHE_ELEMENT_BYTES * workload.batch * elements


def memory_bytes(layout: Layout, weight_bytes: int, workload: Workload) -> int:
    """What a map with these weights takes in memory under a workload, activations excluded."""
    return weight_bytes + kv_cache_bytes(layout, workload)
