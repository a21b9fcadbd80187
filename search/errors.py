"""The errors of the search room."""

from collections.abc import Mapping


class SearchError(Exception):
    """Base of what the search refuses, in one line."""


class InfeasibleBudgetError(SearchError):
    """No assignment meets the budgets; says which, and the smallest that could be met.

    Args:
        smallest: for each budget that binds, the smallest value that the others leave possible.
        units: those whose least costs are the largest part of it.
    """

    def __init__(
        self, message: str, smallest: Mapping[str, int] | None = None, units: tuple[int, ...] = ()
    ) -> None:
        super().__init__(message)
        self.smallest = dict(smallest or {})
        self.units = units
