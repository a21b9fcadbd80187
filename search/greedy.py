"""Greedy: from what the relaxation likes best, the most efficient single changes. Template.

One budget: from the cheapest schemes up, every step of the hulls that still fits. Several: from the
multipliers' choice, first the changes that take most excess away for the least loss, until all
budgets are met; then, in both, whatever improves and still fits.
"""

import numpy as np

from search.infeasible import check_limits
from search.lagrangian import Steps, hull_steps, relax
from search.problem import Choice, Floats, Limits, Problem, Solution, verified
from search.relaxation import multipliers, reduced_costs

REPAIRS = 5000  # changes; more than that many units over budget is HiGHS's to solve


def solve_greedy(
    problem: Problem, resource: str, limit: int, steps: Steps | None = None
) -> Solution:
    """A feasible assignment within one step of the relaxation's optimum.

    Raises:
        InfeasibleBudgetError: not even the cheapest schemes fit.
    """
    check_limits(problem, {resource: limit})
    steps = steps or hull_steps(problem, resource)
    choice = steps.start.copy()
    room = limit - problem.total_cost(choice, resource)
    stopped: set[int] = set()  # a unit that skipped a step can't take the ones that build on it
    for u, s, spent in zip(
        steps.unit.tolist(), steps.scheme.tolist(), steps.spent.tolist(), strict=True
    ):
        if u not in stopped and spent <= room:
            choice[u] = s
            room -= spent
        else:
            stopped.add(u)
    limits = {resource: limit}
    bound = relax(problem, resource, limit, steps).bound
    return verified(problem, fill(problem, limits, choice), bound, limits)


def solve_greedy_several(problem: Problem, limits: Limits) -> Solution | None:
    """A feasible assignment near the optimum of the relaxation, or None if none is found.

    Raises:
        InfeasibleBudgetError: a limit that nothing meets on its own.
    """
    check_limits(problem, limits)
    best = multipliers(problem, limits)
    choice = repair(problem, limits, best.choice, reduced_costs(problem, best.of))
    if choice is None:
        return None
    return verified(problem, fill(problem, limits, choice), best.bound, limits)


def repair(problem: Problem, limits: Limits, start: Choice, reduced: Floats) -> Choice | None:
    """Single changes of the least reduced cost per excess that they remove, until nothing is over."""
    rows, choice = np.arange(len(start)), start.astype(np.intp)
    sizes = {r: max(limit, 1) for r, limit in limits.items()}
    over = {r: problem.total_cost(choice, r) - limit for r, limit in limits.items()}
    for _ in range(REPAIRS):
        if max(over.values(), default=0) <= 0:
            return choice
        removed = np.zeros(reduced.shape)
        for r, excess in over.items():
            change = problem.costs[r] - problem.costs[r][rows, choice][:, None]
            # of a resource that has room only what exceeds it counts
            removed += (max(excess, 0) - np.maximum(change + excess, 0)) / sizes[r]
        paid = np.maximum(reduced - reduced[rows, choice][:, None], 0.0)
        rate = np.where((removed > 0) & problem.offered, removed / (paid + 1e-300), -np.inf)
        u, s = np.unravel_index(int(rate.argmax()), rate.shape)
        if not np.isfinite(rate[u, s]):
            return None
        for r in over:
            over[r] += int(problem.costs[r][u, s] - problem.costs[r][u, choice[u]])
        choice[u] = s
    return None


def fill(problem: Problem, limits: Limits, choice: Choice) -> Choice:
    """Spend what is left on single changes that lessen the loss, most first, while any fits."""
    rows, choice = np.arange(len(choice)), choice.copy()
    rooms = {r: limit - problem.total_cost(choice, r) for r, limit in limits.items()}
    while True:
        fits = problem.offered.copy()
        for r, room in rooms.items():
            fits &= problem.costs[r] - problem.costs[r][rows, choice][:, None] <= room
        gain = np.where(fits, problem.loss[rows, choice][:, None] - problem.loss, -np.inf)
        units, schemes = np.nonzero(gain > 0)
        order = np.argsort(-gain[units, schemes], kind="stable")
        done: set[int] = set()
        for u, s in zip(units[order].tolist(), schemes[order].tolist(), strict=True):
            extra = {r: int(problem.costs[r][u, s] - problem.costs[r][u, choice[u]]) for r in rooms}
            if u not in done and all(extra[r] <= rooms[r] for r in rooms):
                choice[u] = s
                done.add(u)
                rooms = {r: room - extra[r] for r, room in rooms.items()}
        if not done:
            return choice
