"""Greedy: from the cheapest schemes, take the most efficient step that still fits. Template."""

import numpy as np

from search.lagrangian import Steps, hull_steps, relax
from search.problem import Choice, Problem, Solution, verified


def solve_greedy(
    problem: Problem, resource: str, limit: int, steps: Steps | None = None
) -> Solution:
    """A feasible assignment within one step of the relaxation's optimum.

    Raises:
        InfeasibleBudgetError: not even the cheapest schemes fit.
    """
    problem.check_limits({resource: limit})
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
    choice = _fill(problem, resource, choice, room)
    bound = relax(problem, resource, limit, steps).bound
    return verified(problem, choice, bound, {resource: limit})


def _fill(problem: Problem, resource: str, choice: Choice, room: int) -> Choice:
    """Spend what is left on single changes, best first, hull corner or not."""
    cost = problem.costs[resource]
    rows = np.arange(len(choice))
    while True:
        extra = cost - cost[rows, choice][:, None]
        gain = np.where(
            problem.offered & (extra <= room),
            problem.loss[rows, choice][:, None] - problem.loss,
            -np.inf,
        )
        u, s = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[u, s] <= 0:
            return choice
        room -= int(extra[u, s])
        choice = choice.copy()
        choice[u] = s
