"""The Lagrangian relaxation of several budgets: multipliers, a bound, and reduced costs.

    q(lambda) = sum_u min_s (loss_us + sum_r lambda_r cost_rus) - sum_r lambda_r limit_r

bounds the optimum from below for any lambda >= 0. Its maximum, which is the bound of the linear
program, is found by cutting planes: every point evaluated gives a plane above q, and the next point
is where the planes so far have their maximum. (Kelley 1960.) One resource has a closed form instead:
`lagrangian`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from search.problem import Choice, Floats, Limits, Problem

ROUNDS = 200
TOLERANCE = 1e-9
FARTHEST = 1e6  # multipliers in units of (loss range) / limit; at this wall nothing is feasible


@dataclass(frozen=True)
class Multipliers:
    """The best multipliers found.

    Args:
        of: loss per unit of each resource.
        bound: no assignment within the limits has less loss.
        choice: each unit's best scheme under the multipliers; within the limits or nearly so.
    """

    of: Mapping[str, float]
    bound: float
    choice: Choice


def multipliers(problem: Problem, limits: Limits) -> Multipliers:
    """Maximise the bound over the multipliers of all limits."""
    names = list(limits)
    loss = np.where(problem.offered, problem.loss, np.inf)
    least = float(loss.min(axis=1).sum())
    spread = max(
        float(np.where(problem.offered, problem.loss, -np.inf).max(1).sum()) - least, 1e-300
    )
    scales = np.array([max(abs(limits[r]), 1) for r in names], dtype=np.float64)
    costs = [problem.costs[r] / scale for r, scale in zip(names, scales, strict=True)]
    rows = np.arange(len(loss))

    def evaluate(at: Floats) -> tuple[float, Floats, Choice]:
        """q, its slopes and the choice, with losses in units of their spread."""
        value = loss / spread
        for weight, cost in zip(at, costs, strict=True):
            if weight:
                value = value + weight * cost
        choice = value.argmin(axis=1)
        limited = np.array([limits[r] for r in names]) / scales
        slopes = np.array([cost[rows, choice].sum() for cost in costs]) - limited
        return float(value[rows, choice].sum() - at @ limited), slopes, choice

    at = np.zeros(len(names))
    best, best_at, best_choice = -np.inf, at, rows
    planes: list[tuple[float, Floats]] = []
    for _ in range(ROUNDS):
        found, slopes, choice = evaluate(at)
        if found > best:
            best, best_at, best_choice = found, at, choice
        planes.append((found - float(slopes @ at), slopes))
        # max t with t <= intercept + slopes . lambda for every plane
        matrix = np.array([[1.0, *-s] for _, s in planes])
        top = linprog(
            [-1.0, *np.zeros(len(names))], A_ub=matrix, b_ub=[i for i, _ in planes],
            bounds=[(None, None), *[(0, FARTHEST)] * len(names)],
        )  # fmt: skip
        if top.x is None or top.x[0] - best <= TOLERANCE * max(abs(best), 1.0):
            break
        at = top.x[1:]
    of = {r: float(x * spread / s) for r, x, s in zip(names, best_at, scales, strict=True)}
    return Multipliers(of, best * spread, best_choice)


def reduced_costs(problem: Problem, of: Mapping[str, float]) -> Floats:
    """By how much choosing each entry raises the relaxation's bound (U x S, inf not offered)."""
    value = np.where(problem.offered, problem.loss, np.inf)
    for resource, multiplier in of.items():
        value = value + multiplier * problem.costs[resource]
    reduced: Floats = value - value.min(axis=1, keepdims=True)
    return reduced
