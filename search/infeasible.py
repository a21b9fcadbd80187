"""Why no map meets the budgets: which of them bind, what each could be, and which units ask most."""

import numpy as np

from search.errors import InfeasibleBudgetError, SearchError
from search.highs import minimise
from search.problem import Limits, Problem

NAMED = 3  # units in a message
GAP, SECONDS = 1e-3, 10.0


def check_limits(problem: Problem, limits: Limits) -> None:
    """Raise `InfeasibleBudgetError` for a limit that no assignment meets on its own."""
    for resource, limit in limits.items():
        if (smallest := problem.smallest(resource)) > limit:
            text, units = _units(problem, resource)
            raise InfeasibleBudgetError(
                f"no map fits {resource} <= {limit:,}; the smallest possible is {smallest:,}{text}",
                {resource: smallest}, units,
            )  # fmt: skip


def infeasible(problem: Problem, limits: Limits) -> InfeasibleBudgetError:
    """The error for limits that are met one by one, and not together."""
    smallest: dict[str, int] = {}
    for resource in limits:
        others = {r: limit for r, limit in limits.items() if r != resource}
        cost = problem.costs[resource].astype(np.float64)
        cheapest = Problem(cost, problem.costs, problem.offered, problem.few, problem.names)
        try:
            found = minimise(cheapest, others, problem.offered, GAP, SECONDS)
        except SearchError:
            continue  # the others are too many already without it
        smallest[resource] = problem.total_cost(found.choice, resource)
    asked = " and ".join(f"{r} <= {limit:,}" for r, limit in limits.items())
    if problem.few:
        asked += f" with at most {problem.few.most} formats"
    if not smallest:
        return InfeasibleBudgetError(
            f"no map meets {asked} together, nor with any one of them left out; loosen two of them"
        )
    binding = {r: least for r, least in smallest.items() if least > limits[r]}
    could = "; ".join(
        f"{r} could be {least:,} with the others kept" for r, least in binding.items()
    )
    text, units = _units(problem, next(iter(binding), next(iter(limits))))
    message = f"no map meets {asked} together: {could}{text}"
    return InfeasibleBudgetError(message, binding, units)


def _units(problem: Problem, resource: str) -> tuple[str, tuple[int, ...]]:
    """The units whose cheapest schemes cost most, in words and numbers."""
    floors = np.where(problem.offered, problem.costs[resource], np.iinfo(np.int64).max).min(axis=1)
    most = np.argsort(-floors, kind="stable")[:NAMED]
    only = problem.offered.sum(axis=1) == 1
    parts = [
        f"{problem.name(int(u))} at least {floors[u]:,}{' (offered one scheme)' if only[u] else ''}"
        for u in most
    ]
    return f" (most by {', '.join(parts)})", tuple(int(u) for u in most)
