"""The allocation problem as a mixed-integer program, for HiGHS.

One binary variable x_us for each open entry, z_f for each format that is counted:

    min sum loss_us x_us    sum_s x_us = 1    sum c_us x_us <= limit    x_us <= z_f(s)    sum z_f <= k
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack

from search.errors import SearchError
from search.problem import Choice, Ints, Limits, Mask, Problem

LARGEST_COEFFICIENT = 1e5
REPAIRS = 5  # times a solution that breaks a limit by HiGHS's tolerance is solved more tightly
LONGEST = 1e9  # seconds
INFEASIBLE = 2

Row = tuple[Any, float, float]
"""Rows of a sparse matrix, and what their products lie between."""


class NothingFitsError(SearchError):
    """The open entries have no assignment within the limits."""


@dataclass(frozen=True)
class Found:
    """What HiGHS says of the open entries: an assignment, and that none has less loss than `bound`."""

    choice: Choice
    bound: float


def minimise(
    problem: Problem, limits: Limits, open_: Mask, gap: float, seconds: float = np.inf
) -> Found:
    """Decide the open entries; units with one open entry only shift the limits.

    Args:
        problem: tables and rules.
        limits: that must hold.
        open_: U x S, at least one a unit.
        gap: relative, at which HiGHS may stop.
        seconds: after which it stops with what it has.

    Raises:
        NothingFitsError: no assignment of the open entries is within the limits.
        SearchError: none was found in time, or HiGHS's tolerance keeps breaking a limit.
    """
    free = np.flatnonzero(open_.sum(axis=1) > 1)
    choice = open_.argmax(axis=1).astype(np.intp)
    fixed = np.setdiff1d(np.arange(len(choice)), free)
    base = float(problem.loss[fixed, choice[fixed]].sum())
    rooms = {r: limits[r] - int(problem.costs[r][fixed, choice[fixed]].sum()) for r in limits}
    tighter = dict.fromkeys(limits, 0)
    bound = np.inf
    for attempt in range(REPAIRS):
        if len(free):
            left = {r: rooms[r] - tighter[r] for r in rooms}
            try:
                choice[free], dual = _program(problem, left, open_, free, choice, gap, seconds)
            except NothingFitsError as error:
                if attempt:  # within tightened limits, which proves nothing about the real ones
                    raise SearchError(
                        "HiGHS's tolerance hides what is within the limits"
                    ) from error
                raise
            bound = min(bound, dual)  # tightened limits prove nothing about the real ones
        elif problem.breaks(choice, limits):
            raise NothingFitsError("no entry is open, and what is fixed exceeds the limits")
        else:
            bound = 0.0
        over = {r: problem.total_cost(choice, r) - limits[r] for r in limits}
        if not problem.breaks(choice, limits):
            return Found(choice, base + bound)
        tighter = {r: tighter[r] + max(0, over[r]) for r in limits}
    raise SearchError(f"HiGHS keeps exceeding the limits by its tolerance: {over}")


def _program(
    problem: Problem, rooms: Mapping[str, int], open_: Mask, free: Choice, choice: Choice,
    gap: float, seconds: float,
) -> tuple[Choice, float]:  # fmt: skip
    """The free units' schemes and the bound on their loss."""
    rows, schemes = np.nonzero(open_[free])
    units, entries = free[rows], len(rows)
    # HiGHS stops at an absolute gap of 1e-6: without each unit's least loss, and with large
    # numbers, that is far below what any choice changes
    least = np.where(open_, problem.loss, np.inf).min(axis=1)
    loss = problem.loss[units, schemes] - least[units]
    scale = max(float(loss.max()), 1e-300) / LARGEST_COEFFICIENT
    one_each = csr_array((np.ones(entries), (rows, np.arange(entries))), shape=(len(free), entries))
    constraints: list[Row] = [(one_each, 1.0, 1.0)]
    for resource, room in rooms.items():
        cost = problem.costs[resource][units, schemes]
        step = max(int(np.gcd.reduce(cost)), 1)  # small integers keep HiGHS's tolerance harmless
        constraints.append((csr_array(cost[None, :] / step), -np.inf, float(room // step)))
    formats = 0
    if problem.few:
        kept = np.setdiff1d(np.arange(len(choice)), free)
        used = problem.few.used(choice[kept])
        links, formats = _links(problem.few.of[schemes], used)
        constraints = [
            (hstack([matrix, csr_array((matrix.shape[0], formats))]), low, high)
            for matrix, low, high in constraints
        ]
        constraints += [(links, -np.inf, 0.0)]
        count = np.concatenate([np.zeros(entries), np.ones(formats)])
        constraints += [(csr_array(count[None, :]), -np.inf, float(problem.few.most - len(used)))]
    with quiet():
        result = milp(
            np.concatenate([loss / scale, np.zeros(formats)]),
            integrality=np.ones(entries + formats, dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(m, low, high) for m, low, high in constraints],
            options={"mip_rel_gap": gap, "time_limit": min(max(seconds, 0.1), LONGEST)},
        )
    if result.status == INFEASIBLE:
        raise NothingFitsError("no assignment is within the limits")
    if result.x is None:
        raise SearchError(f"HiGHS found no solution: {result.message}")
    chosen = np.flatnonzero(result.x[:entries] > 0.5)
    found = np.empty(len(free), dtype=np.intp)
    found[rows[chosen]] = schemes[chosen]
    return found, float(result.mip_dual_bound) * scale + float(least[free].sum())


@contextmanager
def quiet() -> Iterator[None]:
    """Keep HiGHS's own remarks, which it prints whatever it is told, off standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _links(formats: Ints, used: list[int]) -> tuple[csr_array, int]:
    """Rows x_us - z_f <= 0 for entries of formats that aren't used anyhow, and how many z there are."""
    wanted = sorted({int(f) for f in formats if f >= 0 and f not in used})
    column = {f: i for i, f in enumerate(wanted)}
    entries = [e for e, f in enumerate(formats) if int(f) in column]
    rows = np.arange(len(entries))
    ones = np.ones(len(entries))
    shape = (len(entries), len(formats) + len(wanted))
    z = [len(formats) + column[int(formats[e])] for e in entries]
    links = csr_array((ones, (rows, entries)), shape=shape) - csr_array((ones, (rows, z)), shape)
    return links, len(wanted)
