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
from bitfront.sizes import raised
from bitfront.spending import Joules, Spending, joules_of_runs
from cost_models.devices import LOCAL, Device, DeviceError, load_device
from cost_models.memory import FULL_CACHE_BITS, PHASES, Phase, Workload
from cost_models.probing import core_limit, local_name
from engines import Engine, Rules, load_engine
from quantization.checkpoints import Checkpoint, load_config
from quantization.schemes import Scheme
from quantization.units import Layout
from search.errors import InfeasibleBudgetError
from store.database import Store
from store.times import Place
from workers.pool import Pool

if TYPE_CHECKING:
    from bitfront.plan import Plan
    from cost_models.geometry import Geometry

MEASURED, ANALYTICAL = "measured", "analytical"
NO_BITS = 1e-9


@dataclass(frozen=True)
class Times(Spending):
    """Seconds of a job's maps, by phase.

    Args:
        source: `measured` or `analytical`.
        tables_s: units x schemes; NaN or infinity where there is no kernel.
        overhead_s: what every map takes beside its units.
        errors: relative, of a prediction (one standard deviation); None where nobody has checked.
        profile: what they come from, where they were measured.
        joules: what they cost, where that is known; else the reason, in words.
    """

    source: str
    tables_s: Mapping[Phase, NDArray[np.float64]]
    overhead_s: Mapping[Phase, float]
    errors: Mapping[Phase, float | None]
    profile: Profile | None = None
    joules: Joules | str = ""

    def table(self, phase: Phase) -> NDArray[np.float64]:
        """See `Spending.table`."""
        return self.tables_s[phase]

    def fixed(self, phase: Phase) -> float:
        """See `Spending.fixed`."""
        return self.overhead_s[phase]


@dataclass(frozen=True)
class Limited:
    """A limit of a job on what a phase takes.

    Args:
        resource: its name in the allocation problem.
        spending: seconds or joules.
        most: in that unit.
    """

    resource: str
    phase: Phase
    spending: Spending
    most: float


def resource(phase: Phase) -> str:
    """The name of a phase's costs in the allocation problem."""
    return f"{phase}_ns"


def limits_s(serving: ServingConfig) -> dict[Phase, float]:
    """The phases that are limited, in seconds."""
    wanted: dict[Phase, float | None] = {
        "prefill": serving.max_prefill_s, "decode": serving.max_decode_s,
    }  # fmt: skip
    return {phase: limit for phase, limit in wanted.items() if limit is not None}


def limits_j(serving: ServingConfig) -> dict[Phase, float]:
    """The phases that are limited, in joules."""
    wanted: dict[Phase, float | None] = {
        "prefill": serving.max_prefill_j, "decode": serving.max_decode_j,
    }  # fmt: skip
    return {phase: limit for phase, limit in wanted.items() if limit is not None}


def limited(serving: ServingConfig, times: Times | None) -> list[Limited]:
    """All limits of a job on what its maps take; none before their times are known.

    Raises:
        ConfigError: joules are limited, and nobody knows them.
    """
    if times is None:
        return []
    found = [
        Limited(resource(phase), phase, times, most) for phase, most in limits_s(serving).items()
    ]
    for phase, most in limits_j(serving).items():
        if isinstance(times.joules, str):
            raise ConfigError(
                f"energy can't be limited: {times.joules}; leave --max-{phase}-energy out"
            )
        found.append(Limited(f"{phase}_nj", phase, times.joules, most))
    return found


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
        if limits_s(serving) or limits_j(serving):
            what = "a latency" if limits_s(serving) else "an energy"
            raise ConfigError(
                f"{what} limit needs an engine whose kernels are timed; give --engine llama.cpp"
            )
        return None
    engine = load_engine(serving.engine)
    if serving.device == LOCAL and not isinstance(engine, Engine):
        if limits_s(serving) or limits_j(serving) or serving.threads:
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
        return engine
    assert isinstance(engine, Engine)
    if limits_j(serving) and not (watched := engine.counter())[0]:
        raise ConfigError(
            f"energy can't be limited on this machine: {watched[1]}; name a device of the catalogue "
            "(bitfront devices) for a rough figure, or leave the limit out"
        )
    if serving.tensor_parallel > 1:
        raise ConfigError(
            f"tensor_parallel is {serving.tensor_parallel}, and {engine.name} is timed on one device "
            "of this machine; name a device of the catalogue (bitfront devices)"
        )
    if serving.batch > engine.most_batch:
        raise ConfigError(
            f"batch is {serving.batch}, and {engine.name} is timed with at most {engine.most_batch} on "
            "this machine; lower --batch, or name a device of the catalogue (bitfront devices)"
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
    return Subject(place, engine, workload, layout, menu, offered, bool(limits_j(serving)))


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
    times = Times(
        MEASURED, {p: found.table_s(p) for p in PHASES},
        {p: found.fits[p].overhead_s for p in PHASES}, errors, found,
    )  # fmt: skip
    return replace(times, joules=joules_of_runs(times, found.joules()) or found.no_joules)


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
    times = Times(
        ANALYTICAL,
        {p: table(layout, geometry, menu, device, workload, p, engine.name) for p in PHASES},
        {p: fixed_s(layout, geometry, device, workload, p, bits) for p in PHASES},
        dict.fromkeys(PHASES),
    )
    try:
        joules = _analytical_joules(device, engine, geometry, layout, menu, workload, bits)
    except DeviceError as error:
        return replace(times, joules=str(error))
    return replace(times, joules=joules)


def _analytical_joules(
    device: Device,
    engine: Rules,
    geometry: "Geometry",
    layout: Layout,
    menu: tuple[Scheme, ...],
    workload: Workload,
    bits: float,
) -> Joules:
    """By the device's coefficients, or by those that its power limit gives; `DeviceError` if neither."""
    from cost_models import energy

    known = device if device.energy else energy.from_power(device)
    assert known.energy
    return Joules(
        known.energy.source,
        {p: energy.table(layout, geometry, menu, known, workload, p, engine.name) for p in PHASES},
        {p: energy.fixed_j(layout, geometry, known, workload, p, bits) for p in PHASES},
        dict.fromkeys(PHASES),
    )


def check_limits(plan: "Plan", times: Times) -> None:
    """Refuse limits that no map keeps, with what the cheapest takes."""
    for own in limited(plan.config.serving, times):
        phase, table = own.phase, own.spending.table(own.phase)
        least = own.spending.least(phase, plan.offered)
        if not np.isfinite(least):
            known = plan.offered & np.isfinite(table)
            unit = plan.layout.units[int(np.argmin(known.any(axis=1)))].name
            raise ConfigError(f"{unit} has no scheme whose kernel could be timed; widen the menu")
        if least <= own.most:
            continue
        if own.spending is not times:
            raise InfeasibleBudgetError(
                f"no map takes at most {own.most:.4g} J in {phase}: the least is {raised(least):.4g} J "
                f"({own.spending.fixed(phase):.3g} J of it beside the products of weights); raise "
                "the limit, or add smaller formats to the menu"
            )
        raise InfeasibleBudgetError(
            f"no map has a {phase} latency of at most {1e3 * own.most:.4g} ms: the fastest takes "
            f"{1e3 * raised(least):.4g} ms ({1e3 * times.overhead_s[phase]:.3g} ms of it beside the "
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
        "joules": {"unknown": times.joules}
        if isinstance(times.joules, str)
        else {"source": times.joules.source},
        "noisy_cells": len(found.noisy) if found else 0,
        "failed_cells": [f"{c.kernel} {c.rows}x{c.columns}: {c.failure}" for c in found.failed]
        if found
        else [],
    }
