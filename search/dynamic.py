"""Dynamic programming over one budget: exact without a relaxation, so it checks the others.

    best_u[b] = min_s best_(u-1)[b - cost_us] + loss_us

The budget is counted in the greatest common divisor of all steps, so that nothing is rounded; time
and memory grow with its number of levels.
"""

import numpy as np

from search.errors import SearchError
from search.infeasible import check_limits
from search.problem import Choice, Problem, Solution, verified

MOST_CELLS = 4 * 10**8  # a byte each


def solve_dynamic(problem: Problem, resource: str, limit: int) -> Solution:
    """The optimum.

    Raises:
        InfeasibleBudgetError: nothing fits.
        SearchError: the budget has too many levels.
    """
    check_limits(problem, {resource: limit})
    cost = np.where(problem.offered, problem.costs[resource], np.iinfo(np.int64).max)
    least = cost.min(axis=1, keepdims=True)
    extra = np.where(problem.offered, cost - least, 0)
    step = max(int(np.gcd.reduce(extra, axis=None)), 1)
    most = int(extra.max(axis=1).sum()) // step  # more room than all dearest schemes is no use
    levels = min((limit - int(least.sum())) // step, most) + 1
    if levels * len(cost) > MOST_CELLS:
        raise SearchError(
            f"{levels:,} levels of {resource} for {len(cost)} units are too many for dynamic "
            "programming; take `exact.solve`"
        )
    best, picks = np.zeros(levels), np.zeros((len(cost), levels), dtype=np.uint8)
    for u in range(len(cost)):
        after = np.full(levels, np.inf)
        for s in np.flatnonzero(problem.offered[u]).tolist():
            used = int(extra[u, s]) // step
            if used >= levels:
                continue
            reached = best[: levels - used] + problem.loss[u, s]
            better = reached < after[used:]
            after[used:][better] = reached[better]
            picks[u, used:][better] = s
        best = after
    choice: Choice = np.empty(len(cost), dtype=np.intp)
    level = levels - 1
    for u in reversed(range(len(cost))):
        choice[u] = picks[u, level]
        level -= int(extra[u, choice[u]]) // step
    # the sum in another order than `total_loss`'s may differ in the last place
    return verified(problem, choice, float(best[-1]), {resource: limit})
