"""Times in a job: taken first, corrected by the solver's own maps, checked on the finalists."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bitfront.profiling import time_maps
from bitfront.proposals import choice_of, propose
from bitfront.run import Run
from bitfront.serving import (
    Limited,
    Times,
    check_limits,
    limited,
    measured_times,
    summary,
    timed,
)  # fmt: skip
from cost_models.memory import PHASES
from search.problem import Choice, Problem
from store.queries import update_job
from store.tables import Candidate

SOLVED, FINALISTS = "timing the solver's maps", "timing finalists"
MOST_CORRECTIONS = 6
"""Maps that are run before the limits are solved for once more."""


def with_times(run: Run) -> Run:
    """The run with its maps' times, taken before anything else works on the machine."""
    times = timed(run.plan, run.store, run.pool, run.progress)
    if times is None:
        return run
    job = update_job(run.store, run.job.id, facts={"times": summary(times, run.plan)})
    return replace(run, plan=replace(run.plan, times=times), job=job)


def corrected(run: Run, problems: dict[str, Problem]) -> dict[str, Problem]:
    """The problems with times that know what the solver's own maps take.

    Under a limit a solver picks whatever the model takes for faster than it is. So some of its maps
    are run, the model is fitted again with them, and the limits are solved for once more.
    """
    plan, serving = run.plan, run.plan.config.serving
    limits = limited(serving, plan.times)
    if not limits or plan.times is None or plan.times.profile is None:
        return problems
    profile = plan.times.profile
    choices = _binding(run, problems, limits)
    rows = time_maps(
        profile.subject, run.store, run.pool, run.progress, choices, SOLVED
    )  # fmt: skip
    known = replace(profile, maps=(*profile.maps, *zip(choices, rows, strict=True)))
    times = measured_times(known)
    run.plan = replace(plan, times=times)
    check_limits(run.plan, times)  # what the fit has learned may forbid the fastest map, too
    run.job = update_job(run.store, run.job.id, facts={"times": summary(times, run.plan)})
    costs = {own.resource: own.spending.costs(own.phase) for own in limited(serving, times)}
    return {
        name: replace(problem, costs={**problem.costs, **costs})
        for name, problem in problems.items()
    }


def _binding(run: Run, problems: dict[str, Problem], limits: Sequence[Limited]) -> list[Choice]:
    """Solutions that are predicted to be near a limit, evenly over their sizes."""
    solved = [c for c in propose(run.plan, run.job.id, problems) if c.certificate]
    solved.sort(key=lambda candidate: candidate.weight_bytes)
    choices = [choice_of(run.plan, candidate) for candidate in solved]
    near = [
        choice
        for choice in choices
        if any(
            own.spending.predict(choice, own.phase)
            > own.most * (1 - 3 * (own.spending.errors[own.phase] or 0.0))
            for own in limits
        )
    ]
    places = np.unique(np.linspace(0, len(near) - 1, MOST_CORRECTIONS).round()).astype(int)
    return [near[place] for place in places] if near else []


def check_times(run: Run, times: Times, finalists: Sequence[Candidate]) -> None:
    """Predicted seconds of the finalists, and measured ones where the engine is at hand."""
    choices = [choice_of(run.plan, candidate) for candidate in finalists]
    maps: dict[str, Any] = {
        candidate.map_hash: {
            "predicted": {p: times.predict(choice, p) for p in PHASES},
            **_predicted_joules(times, choice),
        }
        for candidate, choice in zip(finalists, choices, strict=True)
    }
    if found := times.profile:
        rows = time_maps(
            found.subject, run.store, run.pool, run.progress, choices, FINALISTS
        )  # fmt: skip
        fitted = {row.key for _, row in found.maps}
        for candidate, row in zip(finalists, rows, strict=True):
            own = {phase: found.measured_s(row, phase) for phase in PHASES}
            maps[candidate.map_hash] |= {
                "measured": own, "fitted": row.key in fitted,
                "joules": {"prefill": row.prefill_j, "decode": row.decode_j},
            }  # fmt: skip
    facts = {"times": {**run.job.facts["times"], "maps": maps}}
    run.job = update_job(run.store, run.job.id, facts=facts)


def _predicted_joules(times: Times, choice: Choice) -> dict[str, Any]:
    if isinstance(times.joules, str):
        return {}
    return {"predicted_joules": {p: times.joules.predict(choice, p) for p in PHASES}}
