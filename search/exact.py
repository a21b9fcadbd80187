"""The exact solver: what reduced costs leave open, by states for one budget, else by HiGHS.

A scheme whose reduced cost exceeds the distance between the relaxation's bound and a solution at
hand can't be part of a better one. For one budget that leaves a core of some dozens of units, whose
undominated states are soon enumerated (`states`). With several budgets, or a cap on formats, HiGHS
decides the core, and as the first solution is coarse, the core grows: entries of small reduced cost
first, until those that are closed are proven useless or the gap is small enough.
"""

import time
from collections.abc import Iterable

import numpy as np

from search.errors import SearchError
from search.greedy import fill, repair, solve_greedy
from search.highs import NothingFitsError, minimise
from search.infeasible import check_limits, infeasible
from search.lagrangian import Steps, hull_steps, relax
from search.problem import Floats, Limits, Problem, Solution, verified
from search.relaxation import multipliers, reduced_costs
from search.states import solve_core

RELATIVE_GAP = 1e-9
CORE, GROWTH = 1000, 4  # entries that HiGHS is given at first, and how many times more then
SLACK = 1e-6  # of a distance, for rounding


def solve(
    problem: Problem, limits: Limits, gap: float = RELATIVE_GAP, seconds: float = 60.0
) -> Solution:
    """The assignment of least loss within every limit, with its bound.

    Args:
        problem: tables and rules.
        limits: on any of its resources, all at once.
        gap: relative distance to the bound that is good enough.
        seconds: after which the best solution is returned with the gap that it has.

    Raises:
        InfeasibleBudgetError: a limit that nothing meets, or limits that nothing meets together.
        SearchError: nothing was found in time.
    """
    check_limits(problem, limits)
    if len(limits) == 1 and not problem.few:
        resource, limit = next(iter(limits.items()))
        return _solve_one(problem, resource, limit, hull_steps(problem, resource), gap, seconds)
    best = multipliers(problem, limits)
    reduced = reduced_costs(problem, best.of)
    start = repair(problem, limits, best.choice, reduced)
    known = fill(problem, limits, start) if start is not None else None
    if known is None or problem.breaks(known, limits):
        return _grow(problem, limits, reduced, best.bound, None, gap, seconds)
    solution = verified(problem, known, best.bound, limits)
    return _grow(problem, limits, reduced, best.bound, solution, gap, seconds)


def sweep(
    problem: Problem,
    resource: str,
    budgets: Iterable[int],
    others: Limits | None = None,
    gap: float = RELATIVE_GAP,
) -> list[Solution]:
    """Solutions for many budgets of one resource, sharing the hull.

    Args:
        problem: tables and rules.
        resource: whose budgets they are.
        budgets: of it.
        others: limits on other resources that hold for all of them.
        gap: see `solve`.

    Raises:
        InfeasibleBudgetError: as `solve` does.
    """
    budgets, others = list(budgets), others or {}
    for limit in budgets:
        check_limits(problem, {resource: limit, **others})
    if problem.few or others:
        return [solve(problem, {resource: limit, **others}, gap) for limit in budgets]
    steps = hull_steps(problem, resource)
    return [_solve_one(problem, resource, limit, steps, gap, np.inf) for limit in budgets]


def solve_plain(problem: Problem, limits: Limits) -> Solution:
    """HiGHS on the whole problem, without the reduction; as a check."""
    check_limits(problem, limits)
    try:
        found = minimise(problem, limits, problem.offered, RELATIVE_GAP)
    except NothingFitsError as error:
        raise infeasible(problem, limits) from error
    return verified(problem, found.choice, found.bound, limits)


def _solve_one(
    problem: Problem, resource: str, limit: int, steps: Steps, gap: float, seconds: float
) -> Solution:
    greedy = solve_greedy(problem, resource, limit, steps)
    relaxed = relax(problem, resource, limit, steps)
    reduced = reduced_costs(problem, {resource: relaxed.multiplier})
    distance = (greedy.loss - relaxed.bound) * (1 + SLACK)
    core = problem.offered & (reduced <= distance)
    if distance > gap * abs(greedy.loss):
        choice = solve_core(problem, resource, limit, core, reduced, distance)
        if choice is not None:  # the best of all that could beat greedy
            return verified(problem, choice, problem.total_loss(choice), {resource: limit})
    return _grow(problem, {resource: limit}, reduced, relaxed.bound, greedy, gap, seconds)


def _grow(
    problem: Problem, limits: Limits, reduced: Floats, bound: float, best: Solution | None,
    gap: float, seconds: float,
) -> Solution:  # fmt: skip
    """Solve growing cores, until the closed entries can't be in a better solution than `best`."""
    deadline, count = time.monotonic() + seconds, CORE
    order = np.sort(reduced[(reduced > 0) & np.isfinite(reduced)])
    while best is None or best.loss - bound > gap * abs(best.loss):
        useful = np.inf if best is None else (best.loss - bound) * (1 + SLACK)
        reach = min(useful, order[count] if count < len(order) else np.inf)
        open_ = problem.offered & (reduced <= reach)
        left = deadline - time.monotonic()
        if left <= 0 and best is not None:
            break
        try:
            found = minimise(problem, limits, open_, gap, left)
        except NothingFitsError as error:
            if not np.isfinite(reach):
                raise infeasible(problem, limits) from error
            if reach == useful:  # `best` itself needs a closed entry, and can't be improved
                bound = max(bound, best.loss if best else bound)
        except SearchError:  # out of time, or of HiGHS's precision: what there is keeps its gap
            if best is None:
                raise
            break
        else:
            if best is None or problem.total_loss(found.choice) < best.loss:
                best = verified(problem, found.choice, bound, limits)
            if reach == useful:
                # what was closed can't beat `best`, so HiGHS's bound holds for the whole
                bound = max(bound, min(found.bound, best.loss))
                break
        count *= GROWTH
    assert best is not None
    return verified(problem, best.choice, bound, limits)
