"""What a map takes where it is to be served: seconds of its units, and limits on them.

On this machine they are measured (`profiling.py`); on a device of the catalogue they are analytical
(`cost_models/roofline.py`), and said to be.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitfront.config import ConfigError, ServingConfig
from bitfront.profiling import Profile, Subject, profile
from bitfront.progress import Progress
from cost_models.devices import LOCAL, Device, load_device
from cost_models.memory import FULL_CACHE_BITS, PHASES, Phase, Workload
from cost_models.probing import core_limit, local_name
from engines import Engine, Rules, load_engine
from quantization.checkpoints import Checkpoint, load_config
from quantization.schemes import Scheme
from quantization.units import Layout
from search.errors import InfeasibleBudgetError
from search.problem import Choice
from store.database import Store
from store.times import Place
from workers.pool import Pool

if TYPE_CHECKING:
    from bitfront.plan import Plan

MEASURED, ANALYTICAL = "measured", "analytical"
NANOSECONDS = 1e9
NO_BITS = 1e-9


@dataclass(frozen=True)
class Times:
    """Seconds of a job's maps, by phase.

    Args:
        source: `measured` or `analytical`.
        tables_s: units x schemes; NaN or infinity where there is no kernel.
        overhead_s: what every map takes beside its units.
        errors: relative, of a prediction (one standard deviation); None where nobody has checked.
        profile: what they come from, where they were measured.
    """

    source: str
    tables_s: Mapping[Phase, NDArray[np.float64]]
    overhead_s: Mapping[Phase, float]
    errors: Mapping[Phase, float | None]
    profile: Profile | None = None

    def predict(self, choice: Choice, phase: Phase) -> float:
        """Seconds of a map."""
        rows = np.arange(len(choice))
        return float(self.tables_s[phase][rows, choice].sum()) + self.overhead_s[phase]

    def costs(self, phase: Phase) -> NDArray[np.int64]:
        """The table in whole nanoseconds, rounded up, so that sums are exact and keep limits."""
        table = np.nan_to_num(self.tables_s[phase], nan=0.0, posinf=0.0)
        return np.ceil(table * NANOSECONDS).astype(np.int64)

    def fastest(self, phase: Phase, offered: NDArray[np.bool_]) -> float:
        """Seconds of the fastest map; infinite where a unit has no kernel with a time."""
        table = self.tables_s[phase]
        own = np.where(offered & np.isfinite(table), table, np.inf)
        return float(own.min(axis=1).sum()) + self.overhead_s[phase]

    def limit(self, phase: Phase, limit_s: float, offered: NDArray[np.bool_]) -> int:
        """What of a limit is left for the units, in nanoseconds.

        A standard error of the model is kept back, where a map is that fast: under a limit a solver
        finds the maps that the model takes for faster than they are.
        """
        careful = limit_s / (1 + (self.errors[phase] or 0.0))
        kept = min(limit_s, max(careful, self.fastest(phase, offered)))
        rounded_up = offered.shape[0]  # nanoseconds: each unit's are
        return int((kept - self.overhead_s[phase]) * NANOSECONDS) + rounded_up


def resource(phase: Phase) -> str:
    """The name of a phase's costs in the allocation problem."""
    return f"{phase}_ns"


def limits_s(serving: ServingConfig) -> dict[Phase, float]:
    """The phases that are limited, in seconds."""
    wanted: dict[Phase, float | None] = {
        "prefill": serving.max_prefill_s, "decode": serving.max_decode_s,
    }  # fmt: skip
    return {phase: limit for phase, limit in wanted.items() if limit is not None}


def workload_of(serving: ServingConfig) -> Workload:
    """What the job's maps are to do."""
    return Workload(
        serving.batch, serving.context, serving.prompt, serving.generated, serving.tensor_parallel
    )


def engine_of(serving: ServingConfig) -> Rules | None:
    """The engine that a job names; limits on seconds need one."""
    if serving.engine is None:
        if serving.device != LOCAL or serving.threads:
            raise ConfigError(
                "a device or threads to serve with mean nothing without an engine; "
                "give --engine llama.cpp too"
            )
        if limits_s(serving):
            raise ConfigError(
                "a latency limit needs an engine whose kernels are timed; give --engine llama.cpp"
            )
        return None
    engine = load_engine(serving.engine)
    if serving.device == LOCAL and not isinstance(engine, Engine):
        if limits_s(serving) or serving.threads:
            raise ConfigError(
                f"{engine.name} can't be timed on this machine; name a device of the catalogue "
                "(bitfront devices) for analytical latencies, or leave the limits out"
            )
        return engine
    if serving.device != LOCAL:
        load_device(serving.device)
        if serving.threads:
            raise ConfigError(
                f"threads are of this machine; leave --threads out for '{serving.device}'"
            )
    elif serving.tensor_parallel > 1:
        raise ConfigError(
            f"tensor_parallel is {serving.tensor_parallel}, and {engine.name} is timed on one device "
            "of this machine; name a device of the catalogue (bitfront devices)"
        )
    elif serving.batch > 1:
        raise ConfigError(
            f"batch is {serving.batch}, and {engine.name} is timed for one sequence on this "
            "machine; leave --batch out, or name a device of the catalogue (bitfront devices)"
        )
    return engine


def subject_of(
    serving: ServingConfig,
    engine: Engine,
    layout: Layout,
    menu: tuple[Scheme, ...],
    offered: NDArray[np.bool_],
) -> Subject:
    """What is timed on this machine."""
    place = place_of(serving, engine)
    workload = replace(workload_of(serving), generated=Workload().generated)  # changes no time
    return Subject(place, engine, workload, layout, menu, offered)


def place_of(serving: ServingConfig, engine: Engine) -> Place:
    """This machine with an engine."""
    threads = serving.threads or max(1, int(core_limit()))
    name = local_name(accelerated=engine.accelerated)
    return Place(name, engine.name, engine.kernel_version(), threads)


def timed(plan: "Plan", store: Store, pool: Pool, progress: Progress) -> "Times | None":
    """The times of a plan's maps, measured where it is to be served.

    Raises:
        InfeasibleBudgetError: a limit below the fastest map.
    """
    serving, engine = plan.config.serving, plan.engine
    if engine is None:
        return None
    if serving.device == LOCAL:
        if not isinstance(engine, Engine):
            return None
        subject = subject_of(serving, engine, plan.layout, plan.menu, plan.offered)
        times = measured_times(profile(subject, store, pool, progress))
    else:
        times = analytical_times(
            load_device(serving.device), engine,
            plan.original, plan.layout, plan.menu, workload_of(serving),
        )  # fmt: skip
    check_limits(plan, times)
    return times


def measured_times(found: Profile) -> Times:
    """From a profile."""
    errors: dict[Phase, float | None] = {}
    for phase, fit in found.fits.items():
        errors[phase] = fit.error
    return Times(
        MEASURED, {p: found.table_s(p) for p in PHASES},
        {p: found.fits[p].overhead_s for p in PHASES}, errors, found,
    )  # fmt: skip


def analytical_times(
    device: Device,
    engine: Rules,
    checkpoint: Checkpoint,
    layout: Layout,
    menu: tuple[Scheme, ...],
    workload: Workload,
) -> Times:
    """By the roofline."""
    from cost_models.geometry import geometry_of
    from cost_models.roofline import fixed_s, table

    geometry = geometry_of(load_config(checkpoint), layout)
    open_cache = len(layout.weights) < len(layout.units)
    bits = NO_BITS if open_cache else FULL_CACHE_BITS  # then it is in the table
    return Times(
        ANALYTICAL,
        {p: table(layout, geometry, menu, device, workload, p, engine.name) for p in PHASES},
        {p: fixed_s(layout, geometry, device, workload, p, bits) for p in PHASES},
        dict.fromkeys(PHASES),
    )


def check_limits(plan: "Plan", times: Times) -> None:
    """Refuse limits that no map keeps, with what the fastest takes."""
    for phase, limit in limits_s(plan.config.serving).items():
        least = times.fastest(phase, plan.offered)
        if not np.isfinite(least):
            timed = plan.offered & np.isfinite(times.tables_s[phase])
            unit = plan.layout.units[int(np.argmin(timed.any(axis=1)))].name
            raise ConfigError(f"{unit} has no scheme whose kernel could be timed; widen the menu")
        if least > limit:
            raise InfeasibleBudgetError(
                f"no map has a {phase} latency of at most {1e3 * limit:.4g} ms: the fastest takes "
                f"{1e3 * least:.4g} ms ({1e3 * times.overhead_s[phase]:.3g} ms of it beside the "
                "products of weights); raise the limit, or add faster formats to the menu"
            )


def summary(times: Times, plan: "Plan") -> dict[str, Any]:
    """What the store keeps of a job's times."""
    serving = plan.config.serving
    found = times.profile
    return {
        "source": times.source,
        "device": found.subject.place.device if found else serving.device,
        "engine": serving.engine,
        "kernels": found.subject.place.kernels if found else None,
        "threads": found.subject.place.threads if found else None,
        "workload": vars(workload_of(serving)),
        "overhead_s": dict(times.overhead_s),
        "errors": dict(times.errors),
        "noisy_cells": len(found.noisy) if found else 0,
        "failed_cells": [f"{c.kernel} {c.rows}x{c.columns}: {c.failure}" for c in found.failed]
        if found
        else [],
    }
