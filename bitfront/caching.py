"""KV caches of measured maps, from a job's record: what they hold at its workload, and at another."""

from collections.abc import Sequence

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
    """Of a map's caches at any workload."""
    if not is_open(job):
        return kv_cache_bytes(layout, workload)
    if workload == _workload(job):
        return sum(_unit_bytes(job, layout, schemes).values())
    return kv_cache_bytes(layout, workload, layer_bits(job, layout, schemes))


def layer_bits(job: Job, layout: Layout, schemes: Sequence[str]) -> list[float]:
    """Bits of a number in each layer's cache, scales included; one for each of `layout.cache`."""
    of = unit_bits(job, layout, schemes)
    bits = {
        cache_slot(site): of[unit.name]
        for unit in layout.units
        if unit.kind == "cache"
        for site in unit.sites
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


def unit_bits(job: Job, layout: Layout, schemes: Sequence[str]) -> dict[str, float]:
    """Bits of a number of each unit of caches, scales included, by the unit's name."""
    workload = _workload(job)
    kept = {layer.block: layer.window or workload.context for layer in layout.cache}
    found = {}
    for u, nbytes in _unit_bytes(job, layout, schemes).items():
        unit = layout.units[u]
        tokens = [min(workload.context, kept[cache_slot(site)[0]]) for site in unit.sites]
        pairs = zip(unit.sites, tokens, strict=True)
        numbers = workload.batch * sum(site.numel * count for site, count in pairs)
        found[unit.name] = 8 * nbytes / numbers
    return found


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
    from cost_models.cache_bytes import unit_bytes  # torch
    from quantization.schemes import Scheme

    return unit_bytes(layout.units[u], layout, Scheme.parse(scheme), _workload(job))
