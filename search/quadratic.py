"""The allocation problem with pairwise interactions: what two units lose together beyond both alone.

    loss(x) = sum_u loss_u,x(u) + sum_(u<v) pair_u,x(u),v,x(v)

(CLADO, arXiv 2307.05657, section 3.3; IMPQ, arXiv 2509.15455.) From the additive optimum a local
search changes one unit, or exchanges between two, while that helps. HiGHS then solves the linearised
form (y = x_us x_vt), as far as time allows; its bound certifies whichever of both is better.
"""

import time
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from search.errors import SearchError
from search.exact import solve
from search.highs import LARGEST_COEFFICIENT, quiet
from search.problem import Choice, Floats, Limits, Problem, Solution

MOST_ENTRIES = 3000
GAP = 1e-6


@dataclass(frozen=True)
class Quadratic:
    """A problem with interactions.

    Args:
        problem: the additive part.
        pairs: (U S) x (U S), symmetric, zero among the entries of one unit.
    """

    problem: Problem
    pairs: Floats

    def __post_init__(self) -> None:
        units, schemes = self.problem.loss.shape
        if units * schemes > MOST_ENTRIES:
            raise SearchError(
                f"{units * schemes:,} entries are too many for all their pairs (at most "
                f"{MOST_ENTRIES:,}); choose some units for interactions"
            )
        if self.pairs.shape != (units * schemes,) * 2 or not np.allclose(self.pairs, self.pairs.T):
            raise ValueError("pairs must be a symmetric matrix over units times schemes")
        blocks = self.pairs.reshape(units, schemes, units, schemes)
        if np.abs(blocks[np.arange(units), :, np.arange(units)]).max(initial=0.0) > 0:
            raise ValueError("a unit has no pair with itself: put it into the loss")

    def total_loss(self, choice: Choice) -> float:
        """Predicted loss of an assignment, interactions included."""
        chosen = self._entries(choice)
        return self.problem.total_loss(choice) + 0.5 * float(
            self.pairs[np.ix_(chosen, chosen)].sum()
        )

    def _entries(self, choice: Choice) -> Choice:
        entries: Choice = np.arange(len(choice)) * self.problem.loss.shape[1] + choice
        return entries


def solve_quadratic(quadratic: Quadratic, limits: Limits, seconds: float = 20.0) -> Solution:
    """The best assignment found, never worse than the additive optimum, with a bound.

    Args:
        quadratic: the problem.
        limits: as for `exact.solve`.
        seconds: for HiGHS.

    Raises:
        InfeasibleBudgetError: as `exact.solve` does.
    """
    problem = quadratic.problem
    end = time.monotonic() + seconds
    additive = solve(problem, limits, seconds=seconds)
    best = improve(quadratic, limits, additive.choice)
    bound = additive.bound + 0.5 * float(np.minimum(quadratic.pairs, 0.0).sum())
    exact, proven = _linearised(quadratic, limits, max(end - time.monotonic(), 1.0))
    bound = max(bound, proven)
    if exact is not None and quadratic.total_loss(exact) < quadratic.total_loss(best):
        best = exact
    if wrong := problem.breaks(best, limits):
        raise AssertionError(f"the quadratic solver is wrong: {wrong}")
    loss = quadratic.total_loss(best)
    costs = {resource: problem.total_cost(best, resource) for resource in problem.costs}
    return Solution(best, loss, min(bound, loss), costs)


def improve(quadratic: Quadratic, limits: Limits, start: Choice) -> Choice:
    """Single changes and exchanges between two units, best first, while they help and fit."""
    problem, choice = quadratic.problem, start.astype(np.intp).copy()
    units, schemes = problem.loss.shape
    loss = np.where(problem.offered, problem.loss, np.inf).ravel()
    unit = np.repeat(np.arange(units), schemes)
    while True:
        own = quadratic._entries(choice)
        marginal = loss + quadratic.pairs[:, own].sum(axis=1)
        single = marginal - marginal[own][unit]
        # of two changes: each alone, and how their interaction differs from that with the old ones
        pairs = quadratic.pairs
        both = single[:, None] + single[None] + pairs - pairs[:, own[unit]]
        both += -pairs[own[unit]] + pairs[np.ix_(own[unit], own[unit])]
        both[unit[:, None] == unit[None]] = np.inf
        np.fill_diagonal(both, single)  # a change alone
        fits = np.isfinite(both)
        for resource, limit in limits.items():
            cost = problem.costs[resource].ravel()
            extra = cost - cost[own][unit]
            together = extra[:, None] + extra[None]
            np.fill_diagonal(together, extra)
            fits &= together <= limit - problem.total_cost(choice, resource)
        both[~fits] = np.inf
        moved = _first_allowed(quadratic, limits, choice, both, schemes)
        if moved is None:
            return choice
        choice = moved


def _first_allowed(
    quadratic: Quadratic, limits: Limits, choice: Choice, change: Floats, schemes: int
) -> Choice | None:
    """The best move that helps; with a cap on formats, the best that keeps it."""
    tolerance = 1e-12 * max(abs(quadratic.total_loss(choice)), 1e-300)
    for flat in np.argsort(change, axis=None)[: 1 if quadratic.problem.few is None else None]:
        first, second = np.unravel_index(int(flat), change.shape)
        if not change[first, second] < -tolerance:
            return None
        moved = choice.copy()
        for entry in (int(first), int(second)):
            moved[entry // schemes] = entry % schemes
        if quadratic.problem.breaks(moved, limits) is None:
            return moved
    return None


def _linearised(
    quadratic: Quadratic, limits: Limits, seconds: float
) -> tuple[Choice | None, float]:
    """HiGHS on x and y: its assignment if it finds one, and its bound."""
    problem = quadratic.problem
    if problem.few:
        return None, -np.inf
    units, schemes = problem.loss.shape
    entries = np.flatnonzero(problem.offered.ravel())
    at = np.full(units * schemes, -1)
    at[entries] = np.arange(len(entries))
    upper = np.triu(quadratic.pairs[np.ix_(entries, entries)], 1)
    first, second = np.nonzero(upper)
    weights, count = upper[first, second], len(entries)
    total, rows = count + len(first), np.arange(len(first))

    def matrix(values: list[tuple[float, Choice]]) -> csr_array:
        data = np.concatenate([np.full(len(columns), value) for value, columns in values])
        where = np.concatenate([columns for _, columns in values])
        return csr_array((data, (np.tile(rows, len(values)), where)), shape=(len(rows), total))

    y = count + rows
    one_each = csr_array(
        (np.ones(count), (entries // schemes, np.arange(count))), shape=(units, total)
    )
    constraints = [LinearConstraint(one_each, 1, 1)]
    if len(rows):
        # costly pairs push y down, so only x + x' - y <= 1 binds; profitable ones push it up
        links = vstack([
            matrix([(1.0, first), (1.0, second), (-1.0, y)]),
            matrix([(1.0, y), (-1.0, first)]), matrix([(1.0, y), (-1.0, second)]),
        ])  # fmt: skip
        ends = np.concatenate([np.ones(len(rows)), np.zeros(2 * len(rows))])
        constraints.append(LinearConstraint(links, -np.inf, ends))
    for resource, limit in limits.items():
        cost = problem.costs[resource].ravel()[entries]
        step = max(int(np.gcd.reduce(cost)), 1)
        row = np.concatenate([cost / step, np.zeros(len(rows))])
        constraints.append(LinearConstraint(row[None], -np.inf, limit // step))
    objective = np.concatenate([problem.loss.ravel()[entries], weights])
    scale = max(float(np.abs(objective).max()), 1e-300) / LARGEST_COEFFICIENT
    with quiet():
        result = milp(
            objective / scale,
            integrality=np.concatenate([np.ones(count), np.zeros(len(rows))]),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": GAP, "time_limit": seconds},
        )
    bound = result.mip_dual_bound
    proven = float(bound) * scale if bound is not None and np.isfinite(bound) else -np.inf
    if result.x is None:
        return None, proven
    chosen = entries[np.flatnonzero(result.x[:count] > 0.5)]
    choice = np.empty(units, dtype=np.intp)
    choice[chosen // schemes] = chosen % schemes
    return (choice if problem.breaks(choice, limits) is None else None), proven
