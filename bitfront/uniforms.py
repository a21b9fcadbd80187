"""Uniform maps of a job: what a mix must beat, and whose sizes are its budgets by default."""

from typing import TYPE_CHECKING

import numpy as np

from search.controls import uniform
from search.problem import Choice, Problem

if TYPE_CHECKING:
    from bitfront.plan import Plan


def uniform_maps(plan: "Plan", problem: Problem) -> dict[str, Choice]:
    """By name, every unit that has a choice in one scheme.

    Where the KV cache is open, too, weights and cache are uniform each: every scheme of the weights
    beside the largest cache, and every other cache beside the middle one of those.
    """
    caches = plan.caches
    if not caches.any():
        maps = {s.name: uniform(problem, column) for column, s in enumerate(plan.menu)}
        return {name: choice for name, choice in maps.items() if choice is not None}
    weights, pasts = (_parts(plan, problem, rows) for rows in (~caches, caches))
    middle, largest = weights[len(weights) // 2 : len(weights) // 2 + 1], pasts[-1:]
    pairs = [(w, k) for w in weights for k in largest] + [(w, k) for w in middle for k in pasts]
    return {f"{w_name} + KV {k_name}": np.where(caches, k, w) for (w_name, w), (k_name, k) in pairs}


def _parts(plan: "Plan", problem: Problem, rows: np.ndarray) -> list[tuple[str, Choice]]:
    """Those of some units, from the smallest to the largest, equal ones once."""
    found: dict[tuple[int, ...], tuple[int, str, Choice]] = {}
    for column, scheme in enumerate(plan.menu):
        choice = uniform(problem, column, rows)
        if choice is not None:
            chosen = {plan.menu[c].name for c in choice[rows & plan.open_units]}
            name = scheme.name if chosen else "as pinned"
            found.setdefault(tuple(choice[rows]), (plan.weight_bytes(choice), name, choice))
    return [(name, choice) for _, name, choice in sorted(found.values(), key=lambda e: e[:2])]
