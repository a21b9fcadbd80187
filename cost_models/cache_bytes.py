"""Bytes of KV caches at a workload: exact, scales included, sliding windows respected."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cost_models.memory import Workload
from quantization.schemes import Scheme
from quantization.units import Layout, Unit, cache_slot


def unit_bytes(unit: Unit, layout: Layout, scheme: Scheme, workload: Workload) -> int:
    """Of a unit of caches in a format, with every sequence's cache full."""
    from quantization.formats import FORMATS  # torch: queries count numbers alone

    format = FORMATS[scheme.weight]
    return workload.batch * sum(
        format.nbytes((tokens * heads, width))
        for tokens, heads, width in _kept(unit, layout, workload)
    )


def unit_numbers(unit: Unit, layout: Layout, workload: Workload) -> int:
    """How many numbers those bytes hold."""
    return workload.batch * sum(
        t * heads * width for t, heads, width in _kept(unit, layout, workload)
    )


def table(layout: Layout, menu: Sequence[Scheme], workload: Workload) -> NDArray[np.int64]:
    """Units x schemes; zero for units of weights."""
    found = np.zeros((len(layout.units), len(menu)), dtype=np.int64)
    for u, unit in enumerate(layout.units):
        if unit.kind == "cache":
            found[u] = [unit_bytes(unit, layout, scheme, workload) for scheme in menu]
    return found


def _kept(unit: Unit, layout: Layout, workload: Workload) -> list[tuple[int, int, int]]:
    """Tokens, heads and width of each site, for one sequence."""
    windows = {layer.block: layer.window for layer in layout.cache}
    found = []
    for site in unit.sites:
        heads, width = site.shape
        window = windows[cache_slot(site)[0]]
        found.append((min(workload.context, window or workload.context), heads, width))
    return found
