"""Optuna's samplers as a strategy: one study, two objectives, warm-started with the solver's front.

Loss and cost are minimised together (NSGA-II, NSGA-III, TPE, GP …, or any `module:Class`), the
largest budget and all other limits are Optuna's constraints, and the starts are enqueued as the first
trials. With a storage URL `optuna-dashboard` shows the study; a second run takes over what its finished
trials measured and goes on.
"""

import importlib
import inspect
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from search.controls import random_walk
from search.errors import SearchError
from search.problem import Choice, Floats
from search.strategies.base import Question, Record, Records, Setting, Strategy, compared

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial

WIDTH = 4  # chunks that a trial is measured on
POPULATION = 24  # of samplers that have one: small, since measuring is dear
LOSSES = "losses by chunk"
SWITCHES = 6  # exchanges, at most, between a start and its neighbours in the first population


class OptunaStudy(Strategy):
    """Whatever a sampler proposes.

    Args:
        setting: what to search.
        sampler: `NSGAIISampler`, `TPESampler` … of Optuna, `module:Class`, or a package of OptunaHub
            and its class, such as `samplers/auto_sampler:AutoSampler`.
        storage: an SQLAlchemy URL; in memory for None.
        name: of the study.

    Raises:
        SearchError: no such sampler.
    """

    def __init__(
        self,
        setting: Setting,
        sampler: str = "NSGAIISampler",
        storage: str | None = None,
        name: str = "bitfront",
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._setting, self._records = setting, Records()
        self._open: dict[bytes, list[Trial]] = {}
        self._menus = [np.flatnonzero(row) for row in setting.problem.offered]
        self._chunks = list(range(min(WIDTH, setting.chunks)))
        self._best = {limit: self._records.of(maps[0]) for limit, maps in setting.starts.items()}
        self.log = []
        self.study: Study = optuna.create_study(
            storage=storage, study_name=name, load_if_exists=True,
            directions=["minimize", "minimize"], sampler=_sampler(sampler, setting.seed),
        )  # fmt: skip
        with warnings.catch_warnings(action="ignore"):  # that names are experimental
            self.study.set_metric_names(["loss", setting.resource])  # on optuna-dashboard's axes
        self._take_over()
        for choice in self._first_population():
            self.study.enqueue_trial(self._parameters(choice), skip_if_exists=True)

    def ask(self) -> Question | None:
        """See `Strategy.ask`: chunks of open trials first, then a new trial."""
        for key in self._open:
            if question := self._records[key].missing(self._chunks):
                return question
        for _ in range(len(self._menus) + 1):
            trial = self.study.ask()
            record = self._records.of(self._choice(trial))
            if record.knows(self._chunks):
                self._finish(record, trial)
                continue
            self._open.setdefault(record.choice.tobytes(), []).append(trial)
            if question := record.missing(self._chunks):
                return question
        return None

    def tell(self, question: Question, loss: float, slopes: Floats | None = None) -> None:
        """See `Strategy.tell`."""
        record = self._records.of(question.choice)
        record.losses[question.chunk] = loss
        if record.knows(self._chunks):
            for trial in self._open.pop(record.choice.tobytes(), []):
                self._finish(record, trial)
            # a start may arrive after maps that it is to be compared with
            late = any(record is best for best in self._best.values())
            for known in list(self._records.values()) if late else [record]:
                if known.knows(self._chunks):
                    self._compare(known)

    def best(self, limit: int) -> Choice:
        """Of the trials within the budget the one with the least loss."""
        return self._best[limit].choice

    def _first_population(self) -> list[Choice]:
        """The starts, and maps a few exchanges from them: random ones would only dilute the front."""
        setting, generator = self._setting, np.random.default_rng(self._setting.seed)
        starts = [choice for maps in setting.starts.values() for choice in maps]
        near = [
            random_walk(setting.problem, setting.resource, choice, int(switches), generator)
            for choice in starts * (POPULATION // len(starts))
            for switches in [generator.integers(1, SWITCHES + 1)]
        ]
        return [*starts, *near][: max(POPULATION, len(starts))]

    def _take_over(self) -> None:
        """What earlier runs of the study measured; trials that they left open are given up."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING:
                self.study.tell(trial.number, state=TrialState.FAIL)
            elif trial.state == TrialState.COMPLETE and LOSSES in trial.user_attrs:
                chosen = [trial.params.get(self._name(u), m[0]) for u, m in enumerate(self._menus)]
                record = self._records.of(np.array(chosen, dtype=np.intp))
                record.losses = {int(c): x for c, x in trial.user_attrs[LOSSES].items()}
                record.asked = set(record.losses)
        for record in list(self._records.values()):
            if record.knows(self._chunks):
                self._compare(record)

    def _compare(self, record: Record) -> None:
        for limit, best in self._best.items():
            if record is best or not best.knows(self._chunks):
                continue
            if not self._setting.fits(record.choice, limit):
                continue
            better = record.mean(self._chunks) < best.mean(self._chunks)
            self.log.append(compared(limit, best, record, self._chunks, better=better))
            if better:
                self._best[limit] = record

    def _finish(self, record: Record, trial: "Trial") -> None:
        problem, setting = self._setting.problem, self._setting
        limits = {setting.resource: max(setting.starts), **setting.others}
        for resource, limit in limits.items():
            over = problem.total_cost(record.choice, resource) - limit
            trial.set_constraint(resource, float(over))
        cost = problem.total_cost(record.choice, setting.resource)
        trial.set_user_attr(LOSSES, {str(c): loss for c, loss in record.losses.items()})
        self.study.tell(trial, [record.mean(self._chunks), float(cost)])

    def _choice(self, trial: "Trial") -> Choice:
        chosen = [
            menu[0] if len(menu) == 1 else trial.suggest_categorical(self._name(u), menu.tolist())
            for u, menu in enumerate(self._menus)
        ]
        return np.array(chosen, dtype=np.intp)

    def _parameters(self, choice: Choice) -> dict[str, int]:
        return {self._name(u): int(choice[u]) for u, m in enumerate(self._menus) if len(m) > 1}

    def _name(self, unit: int) -> str:
        return self._setting.problem.name(unit)


def _sampler(name: str, seed: int) -> "BaseSampler":
    """The sampler of that name, with seed and population where it has them."""
    found = find_sampler(name)
    takes = inspect.signature(found).parameters
    options = {"seed": seed, "population_size": POPULATION}
    return found(**{key: value for key, value in options.items() if key in takes})


def find_sampler(name: str) -> "type[BaseSampler]":
    """A class of `optuna.samplers`, `module:Class`, or `package/of/OptunaHub:Class`.

    Raises:
        SearchError: it isn't there, or is no sampler.
    """
    import optuna

    module, _, cls = name.rpartition(":")
    try:
        found = getattr(_module(module), cls, None)
    except ImportError as error:
        raise SearchError(f"no sampler '{name}': {error}") from error
    if not (isinstance(found, type) and issubclass(found, optuna.samplers.BaseSampler)):
        known = [n for n in dir(optuna.samplers) if n.endswith("Sampler")]
        raise SearchError(f"no sampler '{name}'; Optuna has {', '.join(known)}, or module:Class")
    return found


def _module(name: str) -> Any:
    import optuna

    if "/" not in name:
        return importlib.import_module(name) if name else optuna.samplers
    hub = importlib.import_module("optunahub")  # pip install optunahub
    try:
        return hub.load_module(name)
    except Exception as error:  # whatever network, GitHub or the package raise
        raise ImportError(f"OptunaHub has it not, or can't be reached ({error})") from error


def check_sampler(name: str) -> None:
    """Raise `SearchError` for a sampler that isn't there or can't search two objectives."""
    import optuna
    from optuna.distributions import CategoricalDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            directions=["minimize", "minimize"], sampler=_sampler(name, seed=0)
        )
        for values in ([0.0, 1.0], [1.0, 0.0], [1.0, 1.0]):
            trial = study.ask({"unit": CategoricalDistribution((0, 1))})
            study.tell(trial, values)
    except (TypeError, ValueError, ImportError) as error:
        raise SearchError(
            f"the sampler '{name}' can't search loss and size together: {error}"
        ) from error
