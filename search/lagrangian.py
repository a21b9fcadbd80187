"""The Lagrangian sweep: the whole convex hull of the front of one resource, in one pass.

Relaxing the budget with a multiplier lambda makes units independent: each takes the scheme with
the least loss + lambda * cost, always a corner of its own lower convex hull. Walking the corners of
all units in the order of their slopes visits every optimum of the relaxation; stopping within a
budget gives a feasible assignment, Dantzig's bound, and the lambda whose reduced costs tell which
schemes can't be in any better one.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from search.problem import Choice, Floats, Ints, Problem


@dataclass(frozen=True)
class Steps:
    """The corners of all units' hulls, by falling efficiency (loss saved a cost spent).

    Args:
        start: each unit's cheapest scheme (U).
        unit, scheme: which unit steps to which scheme (K).
        slope: loss saved by one more unit of cost (K), falling.
        spent: cost that the step adds (K).
    """

    start: Choice
    unit: Choice
    scheme: Choice
    slope: Floats
    spent: Ints


def hull_steps(problem: Problem, resource: str) -> Steps:
    """All corners, sorted. O(US log US)."""
    start = np.empty(len(problem.loss), dtype=np.intp)
    steps: list[tuple[float, int, int, int]] = []
    for u, (loss, cost, offered) in enumerate(
        zip(problem.loss, problem.costs[resource], problem.offered, strict=True)
    ):
        corners = _corners(loss, cost, np.flatnonzero(offered))
        start[u] = corners[0]
        for a, b in pairwise(corners):
            spent = int(cost[b] - cost[a])
            steps.append(((loss[a] - loss[b]) / spent, u, b, spent))
    steps.sort(key=lambda step: (-step[0], step[1]))  # stable: a unit's own slopes fall strictly
    columns = list(zip(*steps, strict=True)) if steps else [(), (), (), ()]
    return Steps(
        start,
        np.array(columns[1], dtype=np.intp),
        np.array(columns[2], dtype=np.intp),
        np.array(columns[0], dtype=np.float64),
        np.array(columns[3], dtype=np.int64),
    )


@dataclass(frozen=True)
class Relaxation:
    """What the relaxation says about one budget.

    Args:
        choice: feasible: every step before the first that doesn't fit.
        multiplier: lambda, the slope of the step that didn't fit; 0 if all fit.
        bound: no assignment within the budget has less loss.
    """

    choice: Choice
    multiplier: float
    bound: float


def relax(problem: Problem, resource: str, limit: int, steps: Steps) -> Relaxation:
    """Solve the relaxation for one budget, which must be feasible."""
    room = limit - problem.total_cost(steps.start, resource)
    fits = int(np.searchsorted(np.cumsum(steps.spent), room, side="right"))
    choice = steps.start.copy()
    choice[steps.unit[:fits]] = steps.scheme[:fits]  # later steps of a unit overwrite earlier ones
    if fits == len(steps.slope):
        return Relaxation(choice, 0.0, problem.total_loss(choice))
    multiplier = float(steps.slope[fits])
    left = limit - problem.total_cost(choice, resource)
    return Relaxation(choice, multiplier, problem.total_loss(choice) - multiplier * left)


def _corners(loss: Floats, cost: Ints, schemes: Choice) -> list[int]:
    """The lower convex hull of (cost, loss): schemes by rising cost and falling loss."""
    hull: list[int] = []
    for s in sorted(schemes.tolist(), key=lambda s: (cost[s], loss[s])):
        if hull and loss[s] >= loss[hull[-1]]:
            continue
        while len(hull) > 1 and _is_above(loss, cost, hull[-2], hull[-1], s):
            hull.pop()
        if hull and cost[s] == cost[hull[-1]]:
            continue
        hull.append(s)
    return hull


def _is_above(loss: Floats, cost: Ints, a: int, b: int, c: int) -> bool:
    """Whether corner b lies on or above the line from a to c."""
    return bool(
        (loss[a] - loss[b]) * float(cost[c] - cost[a])
        <= (loss[a] - loss[c]) * float(cost[b] - cost[a])
    )
