"""Strategies by name; a new one is a file and a line here."""

from collections.abc import Callable

from search.errors import SearchError
from search.strategies.base import Question, Setting, Strategy
from search.strategies.evolution import Evolution
from search.strategies.refinement import Refinement
from search.strategies.surrogate import Surrogate

__all__ = ["STRATEGIES", "Question", "Setting", "Strategy", "check_strategy", "make_strategy"]

STRATEGIES: dict[str, Callable[[Setting], Strategy]] = {
    "refine": Refinement,
    "evolve": Evolution,
    "surrogate": Surrogate,
}
OPTUNA = "optuna:"


def make_strategy(
    name: str, setting: Setting, storage: str | None = None, study: str = "bitfront"
) -> Strategy:
    """`refine`, `evolve`, `surrogate`, or `optuna:SAMPLER`, such as `optuna:NSGAIISampler`.

    Args:
        name: of the strategy.
        setting: what it searches.
        storage: where Optuna keeps its study, an SQLAlchemy URL.
        study: its name there.

    Raises:
        SearchError: no such strategy or sampler.
    """
    check_strategy(name)
    if name in STRATEGIES:
        return STRATEGIES[name](setting)
    from search.strategies.optuna_study import OptunaStudy

    return OptunaStudy(setting, name.removeprefix(OPTUNA), storage, study)


def check_strategy(name: str) -> None:
    """Raise `SearchError` for a strategy or sampler that isn't there."""
    if name.startswith(OPTUNA):
        from search.strategies.optuna_study import check_sampler  # slow to import

        check_sampler(name.removeprefix(OPTUNA))
    elif name not in STRATEGIES:
        known = ", ".join([*STRATEGIES, f"{OPTUNA}SAMPLER"])
        raise SearchError(f"no strategy '{name}'; there are {known}, as in {OPTUNA}NSGAIISampler")
