"""The allocation problem: one scheme for each unit, least loss, costs within limits.

Legend: U units, S schemes. Also known as the multiple-choice knapsack problem.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Choice = NDArray[np.intp]
"""An assignment: the scheme's column for each unit (U)."""

Limits = Mapping[str, int]
"""Upper bounds on resources, in the units of their cost tables."""


@dataclass(frozen=True)
class FewFormats:
    """At most some number of distinct formats in one map: each one wants kernels that are there.

    Args:
        of: the number of each column's format (S); below zero for what doesn't count (bf16).
        most: how many may be used.
    """

    of: Ints
    most: int

    def used(self, columns: Choice) -> list[int]:
        """The formats among some columns that count."""
        formats = np.unique(self.of[columns])
        return [int(f) for f in formats if f >= 0]


@dataclass(frozen=True)
class Problem:
    """Tables of an allocation problem.

    Units that must share a scheme are one row; pinned and forbidden schemes are `offered`; and how
    many units may be changed at all is a resource (`changed`) with a limit like any other.

    Args:
        loss: U x S, predicted; additive. Entries that aren't offered are ignored.
        costs: per resource, U x S integers (bytes, nanoseconds), so that sums are exact.
        offered: U x S, which schemes a unit may get.
        few: a cap on distinct formats.
        names: of the units, for what is said of them.
    """

    loss: Floats
    costs: Mapping[str, Ints]
    offered: Mask
    few: FewFormats | None = None
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.offered.any(axis=1).all():
            raise ValueError("a unit is offered no scheme")
        if not np.isfinite(self.loss[self.offered]).all():
            raise ValueError("an offered scheme has no finite loss")

    def total_loss(self, choice: Choice) -> float:
        """Predicted loss of an assignment."""
        return float(self.loss[np.arange(len(choice)), choice].sum())

    def total_cost(self, choice: Choice, resource: str) -> int:
        """Exact cost of an assignment in one resource."""
        return int(self.costs[resource][np.arange(len(choice)), choice].sum())

    def smallest(self, resource: str) -> int:
        """The least that any assignment costs."""
        table = self.costs[resource]
        return int(np.where(self.offered, table, np.iinfo(np.int64).max).min(axis=1).sum())

    def name(self, unit: int) -> str:
        """What a unit is called."""
        return self.names[unit] if self.names else f"unit {unit}"

    def breaks(self, choice: Choice, limits: Limits) -> str | None:
        """What is wrong with an assignment, in integers; None if nothing is."""
        rows = np.arange(len(choice))
        if not self.offered[rows, choice].all():
            return "a scheme that isn't offered was chosen"
        for resource, limit in limits.items():
            if (cost := self.total_cost(choice, resource)) > limit:
                return f"{resource} is {cost:,}, which is more than {limit:,}"
        if self.few and len(used := self.few.used(choice)) > self.few.most:
            return f"{len(used)} formats are used, and {self.few.most} allowed"
        return None


@dataclass(frozen=True)
class Solution:
    """An assignment with its certificate.

    Args:
        loss: predicted loss of `choice`.
        bound: no assignment within the limits has less loss than this.
        costs: exact sums, re-verified against the limits in integers.
    """

    choice: Choice
    loss: float
    bound: float
    costs: Mapping[str, int]

    @property
    def gap(self) -> float:
        """How much loss better assignments could save at most, relative to `loss`."""
        return max(0.0, self.loss - self.bound) / self.loss if self.loss else 0.0


def verified(problem: Problem, choice: Choice, bound: float, limits: Limits) -> Solution:
    """Make a solution of a choice, after checking it in integers against every limit."""
    if wrong := problem.breaks(choice, limits):
        raise AssertionError(f"a solver is wrong: {wrong}")
    costs = {resource: problem.total_cost(choice, resource) for resource in problem.costs}
    loss = problem.total_loss(choice)
    return Solution(choice, loss, min(bound, loss), costs)


def changed(offered: Mask, alone: Sequence[int]) -> Ints:
    """The cost table of changing a unit: 0 for the columns that leave it alone, else 1 (U x S).

    With a limit it keeps a minimum of units as they are.
    """
    table = np.ones(offered.shape, dtype=np.int64)
    table[:, list(alone)] = 0
    return table
