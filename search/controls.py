"""Controls: what a mix must beat to be worth it. Uniform maps, and random ones at equal cost."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from search.infeasible import check_limits
from search.problem import Choice, Ints, Problem

REDRAWS, SIDEWAYS = 500, 0.2
TRIES = 200  # draws for one exchange


def uniform(problem: Problem, scheme: int, among: NDArray[np.bool_] | None = None) -> Choice | None:
    """The scheme for every unit that has a choice; None if one of them isn't offered it.

    With `among` (units) for those alone; the others get the first that they are offered.
    """
    single = problem.offered.sum(axis=1) == 1
    if among is not None:
        single |= ~among
    choice = np.where(single, problem.offered.argmax(axis=1), scheme).astype(np.intp)
    if not problem.offered[np.arange(len(choice)), choice].all():
        return None
    return choice


def some_formats(problem: Problem, generator: np.random.Generator) -> Problem:
    """The problem with as many random formats as a map may have; itself where there is no cap.

    A unit that would be left without any keeps its own.
    """
    if not problem.few:
        return problem
    of, most = problem.few.of, problem.few.most
    drawn = generator.permutation(problem.few.used(np.arange(len(of))))[:most]
    kept = problem.offered & ((of < 0) | np.isin(of, drawn))
    offered = np.where(kept.any(axis=1, keepdims=True), kept, problem.offered)
    return replace(problem, offered=offered)


def random_at(
    problem: Problem, resource: str, limit: int, generator: np.random.Generator
) -> Choice:
    """A random assignment that costs at most `limit`, and nearly that.

    From each unit's cheapest scheme, random units step to random affordable schemes until nothing
    dearer fits, so that the control isn't handicapped by bytes that it left unused.
    """
    cost: Ints = np.where(problem.offered, problem.costs[resource], np.iinfo(np.int64).max)
    rows = np.arange(len(cost))
    check_limits(problem, {resource: limit})
    choice: Choice = cost.argmin(axis=1).astype(np.intp)
    room = limit - problem.total_cost(choice, resource)
    for u in generator.permutation(len(choice)):
        affordable = np.flatnonzero(cost[u] - cost[u, choice[u]] <= room)
        share = 2 * room / max(len(choice), 1)  # leaves something for units later in the order
        modest = affordable[cost[u, affordable] - cost[u, choice[u]] <= max(share, 0)]
        pick = generator.choice(modest if generator.random() < 0.5 and len(modest) else affordable)
        room -= int(cost[u, pick] - cost[u, choice[u]])
        choice[u] = pick
    while True:
        extra = cost - cost[rows, choice][:, None]
        dearer = np.argwhere((extra > 0) & (extra <= room))
        if not len(dearer):
            return choice
        u, s = dearer[generator.integers(len(dearer))]
        room -= int(extra[u, s])
        choice[u] = s


def random_exactly(
    problem: Problem,
    resource: str,
    target: int,
    generator: np.random.Generator,
    start: Choice | None = None,
) -> Choice:
    """A random assignment that costs exactly `target`, or as nearly as is found.

    Single redraws that lead towards the target, and a few that don't, close the difference from
    `start`; without one, units draw their schemes independently first.
    """
    cost = problem.costs[resource]
    menus = [np.flatnonzero(row) for row in problem.offered]
    drawn = [generator.choice(menu) for menu in menus] if start is None else start
    choice: Choice = np.array(drawn, dtype=np.intp)
    open_ = [u for u, menu in enumerate(menus) if len(menu) > 1]
    over = problem.total_cost(choice, resource) - target
    best, closest = choice.copy(), abs(over)
    near = int(np.median([np.ptp(cost[u, menus[u]]) for u in open_])) if open_ else 0
    steps = np.concatenate([np.diff(cost[u, menus[u]]) for u in open_]) if open_ else [0]
    smallest = int(np.gcd.reduce(steps))  # every map's cost differs from others by multiples of it
    for _ in range(REDRAWS * len(open_)):
        if abs(over) < max(smallest, 1):
            return choice
        u = open_[generator.integers(len(open_))]
        scheme = generator.choice(menus[u])
        step = int(cost[u, scheme] - cost[u, choice[u]])
        if abs(over + step) < abs(over) or (abs(over) < near and generator.random() < SIDEWAYS):
            choice[u], over = scheme, over + step
        if abs(over) < closest:
            best, closest = choice.copy(), abs(over)
    return best


def random_walk(
    problem: Problem, resource: str, start: Choice, steps: int, generator: np.random.Generator
) -> Choice:
    """A random map that costs what `start` costs: `steps` exchanges between units.

    An exchange moves one unit to a random scheme and others until the sum is as before.
    """
    cost, choice = problem.costs[resource], start.copy()
    menus = [np.flatnonzero(row) for row in problem.offered]
    open_ = [u for u, menu in enumerate(menus) if len(menu) > 1]
    for _ in range(steps if open_ else 0):
        changed, over = choice.copy(), 0
        for _ in range(TRIES):
            u = open_[generator.integers(len(open_))]
            scheme = generator.choice(menus[u])
            step = int(cost[u, scheme] - cost[u, changed[u]])
            if step and (not over or abs(over + step) < abs(over)):
                changed[u], over = scheme, over + step
                if not over:
                    choice = changed
                    break
    return choice
