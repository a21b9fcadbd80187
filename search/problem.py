"""The allocation problem: one scheme for each unit, least loss, costs within limits.

Legend: U units, S schemes. Also known as the multiple-choice knapsack problem.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.errors import InfeasibleBudgetError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Choice = NDArray[np.intp]
"""An assignment: the scheme's column for each unit (U)."""

Limits = Mapping[str, int]
"""Upper bounds on resources, in the units of their cost tables."""


@dataclass(frozen=True)
class Problem:
    """Tables of an allocation problem.

    Args:
        loss: U x S, predicted; additive. Entries that aren't offered are ignored.
        costs: per resource, U x S integers (bytes, nanoseconds), so that sums are exact.
        offered: U x S, which schemes a unit may get.
    """

    loss: Floats
    costs: Mapping[str, Ints]
    offered: Mask

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

    def check_limits(self, limits: Limits) -> None:
        """Raise `InfeasibleBudgetError` for a limit that no assignment meets on its own."""
        for resource, limit in limits.items():
            if (smallest := self.smallest(resource)) > limit:
                raise InfeasibleBudgetError(
                    f"no map fits {resource} <= {limit:,}; the smallest possible is {smallest:,}"
                )


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
    if not problem.offered[np.arange(len(choice)), choice].all():
        raise AssertionError("the solver chose a scheme that isn't offered")
    costs = {resource: problem.total_cost(choice, resource) for resource in problem.costs}
    for resource, limit in limits.items():
        if costs[resource] > limit:
            raise AssertionError(f"the solver broke {resource}: {costs[resource]} > {limit}")
    loss = problem.total_loss(choice)
    return Solution(choice, loss, min(bound, loss), costs)
