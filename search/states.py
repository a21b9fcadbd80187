"""The core of one budget by dynamic programming over undominated states.

A state is what some units cost and lose together. One that another undercuts in both is dropped, and
so is one whose reduced costs already add up to more than the distance to a solution at hand, since

    loss(x) = bound + sum_u reduced_us + lambda (limit - cost(x)),    all terms >= 0.

(Pisinger 1995, a minimal algorithm for the multiple-choice knapsack problem.) Units enter in the
order of their smallest alternative, so that what is nearly decided comes last and adds few states.
"""

import numpy as np

from search.problem import Choice, Floats, Ints, Mask, Problem

MOST_STATES = 200_000


def solve_core(
    problem: Problem, resource: str, limit: int, open_: Mask, reduced: Floats, distance: float
) -> Choice | None:
    """The best assignment of the open entries, or None if there would be too many states.

    Args:
        problem: its tables.
        resource: the only budget.
        limit: of the budget.
        open_: U x S, at least one a unit.
        reduced: U x S reduced costs.
        distance: of the solution at hand from the bound.

    Returns:
        The choice; also None where no assignment is at most `distance` from the bound.
    """
    free = np.flatnonzero(open_.sum(axis=1) > 1)
    choice: Choice = open_.argmax(axis=1).astype(np.intp)
    alternatives = np.where(open_ & (reduced > 0), reduced, np.inf).min(axis=1)
    free = free[np.argsort(alternatives[free], kind="stable")]
    menus = [np.flatnonzero(open_[u]) for u in free]
    table = problem.costs[resource]
    fixed = np.setdiff1d(np.arange(len(choice)), free)
    cheapest = np.array([table[u, menu].min() for u, menu in zip(free, menus, strict=True)])
    least = np.concatenate([np.cumsum(cheapest[::-1])[::-1], [0]])  # of the units from i on
    room = limit - int(table[fixed, choice[fixed]].sum())
    costs, paid = np.zeros(1, dtype=np.int64), np.zeros(1)
    losses = np.zeros(1)
    trail: list[tuple[Choice, Choice]] = []
    for i, (u, menu) in enumerate(zip(free, menus, strict=True)):
        cost = (costs[:, None] + table[u, menu]).ravel()
        loss = (losses[:, None] + problem.loss[u, menu]).ravel()
        owed = (paid[:, None] + reduced[u, menu]).ravel()
        kept = np.flatnonzero((owed <= distance) & (cost + least[i + 1] <= room))
        kept = kept[_undominated(cost[kept], loss[kept])]
        if not len(kept) or len(kept) > MOST_STATES:
            return None
        trail.append((kept // len(menu), menu[kept % len(menu)]))
        costs, losses, paid = cost[kept], loss[kept], owed[kept]
    state = int(losses.argmin())
    for (before, scheme), u in zip(reversed(trail), reversed(free), strict=True):
        choice[u] = scheme[state]
        state = int(before[state])
    return choice


def _undominated(cost: Ints, loss: Floats) -> Choice:
    """The places of those that no other undercuts in both."""
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(loss[order])
    keep = np.ones(len(order), dtype=bool)
    keep[1:] = loss[order][1:] < best[:-1]
    return order[keep]
