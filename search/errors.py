"""The errors of the search room."""


class SearchError(Exception):
    """Base of what the search refuses, in one line."""


class InfeasibleBudgetError(SearchError):
    """No assignment meets the budgets; says which, and the smallest that could be met."""
