"""KV caches of measured maps, from a job's record: what they hold at its workload, and at another."""

from collections.abc import Sequence

from cost_models.cache_bytes import unit_bytes, unit_numbers
from cost_models.memory import FULL_CACHE_BITS, Workload, kv_cache_bytes
from quantization.units import KEYS, VALUES, Layout, cache_slot
from store.tables import Job


def is_open(job: Job) -> bool:
    """Whether the job chose formats of its KV cache."""
    return "caches" in job.facts


def held_bytes(job: Job, layout: Layout, schemes: Sequence[str]) -> int | None:
    """Of a map's caches at the job's workload; None where the job left them as they are."""
    if not is_open(job):
        return None
    return sum(_unit_bytes(job, layout, schemes).values())


def bytes_at(job: Job, layout: Layout, schemes: Sequence[str], workload: Workload) -> int:
    """Of a map's caches at any workload, where the job chose their formats."""
    if workload == _workload(job):
        return sum(_unit_bytes(job, layout, schemes).values())
    return kv_cache_bytes(layout, workload, layer_bits(job, layout, schemes))


def layer_bits(job: Job, layout: Layout, schemes: Sequence[str]) -> list[float]:
    """Bits of a number in each layer's cache, scales included; one for each of `layout.cache`."""
    held = numbers(job, layout)
    bits = {
        cache_slot(site): 8 * nbytes / held[u]
        for u, nbytes in _unit_bytes(job, layout, schemes).items()
        for site in layout.units[u].sites
    }
    found = []
    for layer in layout.cache:
        assert layer.block is not None
        sizes = [(KEYS, layer.keys), (VALUES, layer.values)]
        total = sum(
            bits.get((layer.block, kind), FULL_CACHE_BITS) * shape[0] * shape[1]
            for kind, shape in sizes
            if shape
        )
        found.append(total / layer.elements)
    return found


def numbers(job: Job, layout: Layout) -> list[int]:
    """How many numbers each unit holds: weights, or keys and values at the job's workload."""
    if not is_open(job):
        return [unit.numel for unit in layout.units]
    workload = _workload(job)
    return [unit.numel or unit_numbers(unit, layout, workload) for unit in layout.units]


def _workload(job: Job) -> Workload:
    return Workload(**job.facts["memory"]["workload"])


def _unit_bytes(job: Job, layout: Layout, schemes: Sequence[str]) -> dict[int, int]:
    """By number of the unit."""
    table, menu = job.facts["bytes_table"], job.facts["menu"]
    return {
        u: table[u][menu.index(schemes[u])]
        if schemes[u] in menu
        else _beyond(job, layout, u, schemes[u])
        for u, unit in enumerate(layout.units)
        if unit.kind == "cache"
    }


def _beyond(job: Job, layout: Layout, u: int, scheme: str) -> int:
    """Of a format that the job's menu doesn't have: a map was given to it."""
    from quantization.schemes import Scheme

    return unit_bytes(layout.units[u], layout, Scheme.parse(scheme), _workload(job))
