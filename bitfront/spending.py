"""What maps take by phase, in seconds or joules: predictions, whole numbers for a solver, limits.

Times are measured or analytical (`serving.py`). Joules are made of the times, where a counter of this
machine (RAPL, NVML) has watched whole maps: as many a second as those took on average. On a device of the
catalogue they come from the power limit, which is a guess and says so (`cost_models/energy.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot

import numpy as np
from numpy.typing import NDArray

from cost_models.memory import PHASES, Phase
from search.problem import Choice

FINE = 1e9
"""Whole numbers in one unit: nanoseconds, nanojoules."""


class Spending(ABC):
    """What maps take in each phase: the sum over units of a table, and what every map takes."""

    errors: Mapping[Phase, float | None]
    """Relative, of a prediction (one standard deviation); None where nobody has checked."""

    @abstractmethod
    def table(self, phase: Phase) -> NDArray[np.float64]:
        """Units x schemes; NaN or infinity where there is no kernel."""

    @abstractmethod
    def fixed(self, phase: Phase) -> float:
        """What every map takes beside its units."""

    def predict(self, choice: Choice, phase: Phase) -> float:
        """What a map takes."""
        rows = np.arange(len(choice))
        return float(self.table(phase)[rows, choice].sum()) + self.fixed(phase)

    def costs(self, phase: Phase) -> NDArray[np.int64]:
        """The table in whole numbers, rounded up, so that sums are exact and keep limits."""
        table = np.nan_to_num(self.table(phase), nan=0.0, posinf=0.0)
        return np.ceil(table * FINE).astype(np.int64)

    def least(self, phase: Phase, offered: NDArray[np.bool_]) -> float:
        """What the cheapest map takes; infinite where a unit has no kernel that is known."""
        table = self.table(phase)
        own = np.where(offered & np.isfinite(table), table, np.inf)
        return float(own.min(axis=1).sum()) + self.fixed(phase)

    def limit(self, phase: Phase, limit: float, offered: NDArray[np.bool_]) -> int:
        """What of a limit is left for the units, in whole numbers.

        A standard error of the model is kept back, where a map is that cheap: under a limit a solver
        finds the maps that the model takes for cheaper than they are.
        """
        careful = limit / (1 + (self.errors[phase] or 0.0))
        kept = min(limit, max(careful, self.least(phase, offered)))
        rounded_up = offered.shape[0]  # each unit's are
        return int((kept - self.fixed(phase)) * FINE) + rounded_up


@dataclass(frozen=True)
class Joules(Spending):
    """Joules of a job's maps, by phase: of a prompt, and of a generated token.

    Args:
        source: where they come from, in words.
    """

    source: str
    tables_j: Mapping[Phase, NDArray[np.float64]]
    fixed_j: Mapping[Phase, float]
    errors: Mapping[Phase, float | None]

    def table(self, phase: Phase) -> NDArray[np.float64]:
        """See `Spending.table`."""
        return self.tables_j[phase]

    def fixed(self, phase: Phase) -> float:
        """See `Spending.fixed`."""
        return self.fixed_j[phase]


def joules_of_runs(
    times: Spending, runs: Mapping[Phase, Sequence[tuple[float | None, float]]]
) -> Joules | None:
    """Joules as a power times the seconds of `times`, from whole maps' joules and seconds.

    None where no counter watched them, or one that stood still.
    """
    watts, errors = {}, {}
    for phase in PHASES:
        drawn = np.array([joules / seconds for joules, seconds in runs[phase] if joules])
        if not len(drawn):
            return None
        watts[phase] = float(drawn.mean())
        errors[phase] = hypot(float(drawn.std()) / watts[phase], times.errors[phase] or 0.0)
    told = ", ".join(f"{watts[phase]:.3g} W in {phase}" for phase in PHASES)
    return Joules(
        f"the maps that were run drew {told}",
        {phase: watts[phase] * times.table(phase) for phase in PHASES},
        {phase: watts[phase] * times.fixed(phase) for phase in PHASES},
        errors,
    )
