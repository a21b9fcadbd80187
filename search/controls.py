"""Controls: what a mix must beat to be worth it. Uniform maps, and random ones at equal cost."""

import numpy as np

from search.problem import Choice, Ints, Problem


def uniform(problem: Problem, scheme: int) -> Choice | None:
    """The scheme for every unit that has a choice; None if one of them isn't offered it."""
    single = problem.offered.sum(axis=1) == 1
    choice = np.where(single, problem.offered.argmax(axis=1), scheme).astype(np.intp)
    if not problem.offered[np.arange(len(choice)), choice].all():
        return None
    return choice


def random_at(
    problem: Problem, resource: str, limit: int, generator: np.random.Generator
) -> Choice:
    """A random assignment that costs at most `limit`, and nearly that.

    From each unit's cheapest scheme, random units step to random affordable schemes until nothing
    dearer fits, so that the control isn't handicapped by bytes that it left unused.
    """
    cost: Ints = np.where(problem.offered, problem.costs[resource], np.iinfo(np.int64).max)
    rows = np.arange(len(cost))
    problem.check_limits({resource: limit})
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
