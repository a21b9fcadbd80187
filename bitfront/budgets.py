"""Budgets of a job in weight bytes: asked for, or the menu's own sizes; memory limits cap them."""

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from bitfront import serving
from bitfront.config import MOST_BYTES, ConfigError
from bitfront.uniforms import uniform_maps
from cost_models import weight_bytes
from cost_models.geometry import geometry_of
from cost_models.memory import Sharing, activation_bytes, kv_cache_bytes, sharing_of
from quantization.checkpoints import load_config
from search.errors import InfeasibleBudgetError

if TYPE_CHECKING:
    from bitfront.plan import Plan


def budgets(plan: "Plan") -> tuple[int, ...]:
    """The job's budgets in weight bytes, rising.

    Raises:
        InfeasibleBudgetError: one below the smallest map, or a limit on memory that none fits into.
        ConfigError: a limit on memory for a model whose KV cache is unknown.
    """
    fixed = plan.fixed_bytes
    wanted = [fixed + int(bits * plan.quantizable_numel / 8) for bits in plan.config.budgets]
    wanted += plan.config.budgets_bytes
    smallest = plan.other_bytes + _smallest(plan)
    most = most_bytes(plan)
    if smallest > most:
        limit = plan.config.serving.max_memory_bytes or 0
        cache = f"KV cache of {plan.config.serving.batch} x {plan.config.serving.context} tokens"
        has, rest = ("weights", f"the {cache} and to activations")
        if plan.caches.any():
            has, rest = (f"weights and {cache}", "activations")
        raise InfeasibleBudgetError(
            f"no map fits into {limit:,} bytes of memory: the smallest has {smallest:,} of {has}, "
            f"and {limit - most:,} go to {rest}; raise --max-memory, lower "
            "--context, or add smaller formats to the menu"
        )
    wanted = [min(budget, most) for budget in wanted]
    for budget in wanted:
        if budget < smallest:
            bits = 8 * (smallest - fixed) / plan.quantizable_numel
            if plan.caches.any():
                load = plan.config.serving
                cache = plan.bytes_table[plan.caches].min(
                    axis=1, initial=MOST_BYTES, where=plan.offered[plan.caches]
                )
                raise InfeasibleBudgetError(
                    f"no map fits into {budget:,} bytes of weights and KV cache: the smallest has "
                    f"{smallest:,}, of which {int(cache.sum()):,} are a cache of {load.batch} x "
                    f"{load.context} tokens; raise the budget, lower --context, or add smaller formats"
                )
            raise InfeasibleBudgetError(
                f"no map fits into {budget:,} weight bytes: the smallest has {smallest:,} "
                f"({bits:.4g} bits on average; {fixed:,} of the bytes are pinned to full "
                "precision); raise the budget, or add smaller formats to the menu"
            )
    sizes = [min(b, most) for b in _default_budgets(plan) if b >= smallest]
    return tuple(sorted(set(wanted or sizes)))


def most_bytes(plan: "Plan") -> int:
    """The bytes that a limit on memory leaves for weights (and caches, where the menu opens them).

    More than any map has, without a limit.

    Raises:
        ConfigError: the model's KV cache is unknown.
    """
    wanted = plan.config.serving
    if wanted.max_memory_bytes is None:
        return int(np.iinfo(np.int64).max)
    workload = serving.workload_of(wanted)
    if not plan.layout.cache:
        raise ConfigError(
            "this model's KV cache is unknown (its forward pass could not be traced), so its memory "
            "is, too; constrain --max-size instead of --max-memory"
        )
    sharing = sharing_in(plan)
    cache = 0 if plan.caches.any() else sharing.cache(kv_cache_bytes(plan.layout, workload))
    return sharing.most_weights(wanted.max_memory_bytes - cache - working_bytes(plan))


def sharing_in(plan: "Plan") -> Sharing:
    """What each device of the job's workload holds."""
    geometry = geometry_of(load_config(plan.original), plan.layout)
    workload = serving.workload_of(plan.config.serving)
    return sharing_of(plan.layout, geometry, workload, plan.other_bytes)


def working_bytes(plan: "Plan") -> int:
    """Activations of the job's workload."""
    geometry = geometry_of(load_config(plan.original), plan.layout)
    return activation_bytes(plan.layout, geometry, serving.workload_of(plan.config.serving))


def _smallest(plan: "Plan") -> int:
    """The bytes of the smallest map that the menu's rules allow."""
    problem = plan.problem(plan.bytes_table.astype(np.float64))
    if not (problem.few or plan.other_limits):
        return problem.smallest(weight_bytes.RESOURCE)
    from search.exact import solve

    return solve(problem, plan.other_limits).costs[weight_bytes.RESOURCE]


def _default_budgets(plan: "Plan") -> list[int]:
    """The bytes of the menu's uniform maps and the middles between neighbours."""
    problem = plan.problem(np.zeros(plan.bytes_table.shape))
    maps = uniform_maps(plan, problem).values()
    sizes = sorted({plan.weight_bytes(choice) for choice in maps})
    return sizes + [(a + b) // 2 for a, b in pairwise(sizes)]
