"""The exact solver: HiGHS on what the Lagrangian's reduced costs leave open.

A scheme whose reduced cost exceeds the distance between the relaxation's bound and the greedy
solution can't be part of a better assignment. For one budget that usually leaves a handful of
units to decide, and HiGHS proves the optimum of those in milliseconds.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from search.errors import InfeasibleBudgetError, SearchError
from search.greedy import solve_greedy
from search.lagrangian import Steps, hull_steps, reduced_costs, relax
from search.problem import Choice, Limits, Mask, Problem, Solution, verified

RELATIVE_GAP = 1e-9
LARGEST_COEFFICIENT = 1e5
REPAIRS = 5  # times a solution that breaks a limit by HiGHS's tolerance is solved more tightly


def solve(problem: Problem, limits: Limits) -> Solution:
    """The assignment of least loss within every limit, with its bound.

    Raises:
        InfeasibleBudgetError: a limit that nothing meets, or limits that nothing meets together.
        SearchError: HiGHS gave up.
    """
    problem.check_limits(limits)
    if len(limits) == 1:
        resource, limit = next(iter(limits.items()))
        return _solve_one(problem, resource, limit, hull_steps(problem, resource))
    return solve_plain(problem, limits)


def sweep(problem: Problem, resource: str, budgets: Iterable[int]) -> list[Solution]:
    """Exact solutions for many budgets of one resource, sharing the hull."""
    budgets = list(budgets)
    for limit in budgets:
        problem.check_limits({resource: limit})
    steps = hull_steps(problem, resource)
    return [_solve_one(problem, resource, limit, steps) for limit in budgets]


def solve_plain(problem: Problem, limits: Limits) -> Solution:
    """HiGHS on the whole problem, without the reduction; for several limits and as a check."""
    problem.check_limits(limits)
    return _highs(problem, limits, problem.offered)


def _solve_one(problem: Problem, resource: str, limit: int, steps: Steps) -> Solution:
    greedy = solve_greedy(problem, resource, limit, steps)
    relaxed = relax(problem, resource, limit, steps)
    distance = greedy.loss - relaxed.bound
    if distance <= RELATIVE_GAP * abs(greedy.loss):
        return greedy
    slack = distance * (1 + 1e-6)
    open_ = problem.offered & (reduced_costs(problem, resource, relaxed.multiplier) <= slack)
    exact = _highs(problem, {resource: limit}, open_)
    best = exact if exact.loss <= greedy.loss else greedy
    # what was closed can't beat greedy, so HiGHS's bound on the rest holds for the whole
    return verified(problem, best.choice, min(exact.bound, best.loss), {resource: limit})


def _highs(problem: Problem, limits: Limits, open_: Mask) -> Solution:
    """Decide the open entries; units with one open entry only shift the limits."""
    free = np.flatnonzero(open_.sum(axis=1) > 1)
    choice = open_.argmax(axis=1).astype(np.intp)
    fixed = np.setdiff1d(np.arange(len(choice)), free)
    base = float(problem.loss[fixed, choice[fixed]].sum())
    used = {r: int(problem.costs[r][fixed, choice[fixed]].sum()) for r in limits}
    if not len(free):
        return verified(problem, choice, base, limits)
    rooms: Mapping[str, int] = {r: limit - used[r] for r, limit in limits.items()}
    tighter = dict.fromkeys(limits, 0)
    bound = np.inf
    for _ in range(REPAIRS):
        found, dual = _solve_open(problem, {r: rooms[r] - tighter[r] for r in rooms}, open_, free)
        bound = min(bound, dual)  # tightened limits prove nothing about the real ones
        choice[free] = found
        over = {r: problem.total_cost(choice, r) - limits[r] for r in limits}
        if max(over.values()) <= 0:
            return verified(problem, choice, base + bound, limits)
        tighter = {r: tighter[r] + max(0, over[r]) for r in limits}
    raise SearchError(f"HiGHS keeps exceeding the limits by its tolerance: {over}")


def _solve_open(
    problem: Problem, rooms: Mapping[str, int], open_: Mask, free: Choice
) -> tuple[Choice, float]:
    """Minimise over binary variables, one for each open entry of the free units."""
    rows, schemes = np.nonzero(open_[free])
    units = free[rows]
    # HiGHS stops at an absolute gap of 1e-6: without each unit's least loss, and with large
    # numbers, that is far below what any choice changes
    least = np.where(open_, problem.loss, np.inf).min(axis=1)
    loss = problem.loss[units, schemes] - least[units]
    scale = max(float(loss.max()), 1e-300) / LARGEST_COEFFICIENT
    one_each = csr_array(
        (np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(free), len(rows))
    )
    constraints = [LinearConstraint(one_each, 1, 1)]
    for resource, room in rooms.items():
        cost = problem.costs[resource][units, schemes]
        step = max(int(np.gcd.reduce(cost)), 1)  # small integers keep HiGHS's tolerance harmless
        constraints.append(LinearConstraint(cost[None, :] / step, -np.inf, room // step))
    result = milp(
        loss / scale,
        integrality=np.ones(len(rows), dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": RELATIVE_GAP},
    )
    if result.status == 2:
        smallest = ", ".join(f"{r} >= {problem.smallest(r):,}" for r in rooms)
        raise InfeasibleBudgetError(
            f"the budgets can't be met together; each alone would need {smallest}"
        )
    if result.x is None:
        raise SearchError(f"HiGHS found no solution: {result.message}")
    chosen = np.flatnonzero(result.x > 0.5)
    found = np.empty(len(free), dtype=np.intp)
    found[rows[chosen]] = schemes[chosen]
    return found, float(result.mip_dual_bound) * scale + float(least[free].sum())
