"""The refinement stage of a job: drives the ask/tell search against the workers and the store.

Answers are kept like all measurements (the loss as a measurement, the slopes as a share of a table),
so a killed job walks the same path again from the store and goes on where it was.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.fronts import REFINED
from bitfront.plan import Plan
from bitfront.proposals import candidate_of
from bitfront.run import Run
from bitfront.scoring import forecast_bytes
from cost_models import weight_bytes
from quantization.errors import MeasurementError
from search.problem import Problem
from search.strategies import Question, Setting, Strategy, make_strategy
from sensitivity import Share
from store.queries import find_share, key_of, measurements, save_measurement, save_share, update_job
from store.tables import Candidate, Measurement, SensitivityShare
from workers.pool import Task

REFINE = "refining by measurement"
SLOPES_WEIGHT = 4  # of a measurement with slopes, in measurements
SLOPES = "slopes of errors#2"

Choice = NDArray[np.intp]
Answer = tuple[float, NDArray[np.float64] | None]
"""Nats per token, and slopes where they were asked for."""


def refine(run: Run, problem: Problem, starts: dict[int, list[Choice]]) -> list[Candidate]:
    """New candidates: the best map found at each budget, where it isn't the one that it began with.

    Args:
        run: the job.
        problem: its loss table in nats, or in proportion to them.
        starts: by budget in weight bytes, maps within it, the best measured one first.
    """
    plan, text = run.plan, run.plan.texts["search"]
    wanted = plan.config.refinement
    if not wanted.measurements or not starts:
        return []
    limits = {budget - plan.other_bytes: maps for budget, maps in starts.items()}
    setting = Setting(
        problem, weight_bytes.RESOURCE, limits, len(text.ids), plan.config.seed, plan.other_limits
    )
    search = make_strategy(wanted.strategy, setting, run.store.url, f"job {run.job.id}")
    end = time.monotonic() + 60 * wanted.minutes if wanted.minutes else np.inf
    asked = open_ = 0
    failure: MeasurementError | None = None
    with run.progress.stage(REFINE, wanted.measurements, SLOPES_WEIGHT) as advance:
        while True:
            while asked < wanted.measurements and open_ < run.pool.workers and not failure:
                question = search.ask() if time.monotonic() < end else None
                if question is None:
                    break
                asked += 1
                if known := _known(run, question):
                    search.tell(question, *known)
                    advance(1)
                else:
                    run.pool.submit(_task(run, question))
                    open_ += 1
            if not open_:
                break
            outcome = run.pool.next()
            open_ -= 1
            if isinstance(outcome.error, MeasurementError):
                failure = outcome.error  # what the other workers are at is still awaited
            elif outcome.error:
                raise outcome.error
            else:
                question = outcome.task.label
                if not outcome.known:
                    _save(run, question, outcome.value)
                told = _known(run, question)  # as the store has it, and a resumed job will hear it
                assert told is not None
                search.tell(question, *told)
                advance(1)
    # a model that can't be cut into blocks, or NaN on the way: what was found until then counts
    return _conclude(run, search, starts, asked, str(failure) if failure else None)


def _conclude(
    run: Run, search: Strategy, starts: dict[int, list[Choice]], asked: int, failure: str | None
) -> list[Candidate]:
    plan, found, budgets = run.plan, [], []
    for budget, maps in starts.items():
        limit = budget - plan.other_bytes
        best, steps = search.best(limit), [e for e in search.log if e["limit"] == limit]
        changed = plan.map_hash(best) != plan.map_hash(maps[0])
        budgets.append({"budget": budget, "changed": changed, "steps": steps})
        if changed:
            origin = f"{REFINED}, at most {budget:,} bytes"
            found.append(candidate_of(plan, run.job.id, best, origin))
    facts: dict[str, Any] = {"measurements": asked, "budgets": budgets}
    if failure:
        facts = {**facts, "failed": failure} if search.log else {"failed": failure}
    run.job = update_job(run.store, run.job.id, facts={"refinement": facts})
    return found


def _keys(run: Run, question: Question) -> tuple[str, str]:
    """Of the measurement and of the slopes."""
    plan = run.plan
    chunk = plan.texts["search"].hashes[question.chunk]
    measured = run.quality.of(plan.map_hash(question.choice), chunk)
    offered = (",".join(scheme.name for scheme in row) for row in plan.choices)
    return measured, key_of(SLOPES, measured, *offered)


def _task(run: Run, question: Question) -> Task:
    plan = run.plan
    names = tuple(scheme.name for scheme in plan.schemes(question.choice))
    arguments = {"schemes": names, "ids": plan.texts["search"].ids[question.chunk]}
    measured, slopes = _keys(run, question)
    if not question.slopes:
        return Task("measure", arguments, label=question, key=measured, table=Measurement)
    share = Share((0, len(plan.choices)), (0, 1))
    memory = forecast_bytes(plan, "fisher", share, "search")  # the same passes
    return Task(
        "slopes", arguments, question, memory_bytes=memory, key=slopes, table=SensitivityShare
    )


def _known(run: Run, question: Question) -> Answer | None:
    measured, slopes = _keys(run, question)
    loss = measurements(run.store, [measured]).get(measured)
    row = find_share(run.store, slopes) if question.slopes else None
    if loss is None or (question.slopes and row is None):
        return None
    found = np.array(row.sums, dtype=np.float64) / loss.tokens if row else None
    return loss.kl_sum / loss.tokens, found


def _save(run: Run, question: Question, value: Any) -> None:
    """Keep what a worker measured: a `Measurement` of evaluation, or `LocalSlopes` with one."""
    measured, slopes = _keys(run, question)
    plan, loss = run.plan, value.loss if question.slopes else value
    chunk = plan.texts["search"].hashes[question.chunk]
    map_hash = plan.map_hash(question.choice)
    row = Measurement(
        key=measured, map_hash=map_hash, chunk_hash=chunk, **vars(run.quality), **vars(loss)
    )
    save_measurement(run.store, row)
    if not question.slopes:
        return
    sums = [[None if np.isnan(x) else float(x) for x in line] for line in value.sums]
    share = SensitivityShare(
        key=slopes, estimator=SLOPES, sums=sums, tokens=[float(loss.tokens)] * len(sums),
        provenance={"map_hash": map_hash, "chunk_hash": chunk, **vars(run.quality)},
        experts={}, maps=[], seconds=loss.seconds,
    )  # fmt: skip
    save_share(run.store, share)


def starts_of(
    plan: Plan, candidates: Sequence[Candidate], kl: dict[str, float]
) -> dict[int, list[Choice]]:
    """By budget, the map within it that measured best; none where nothing was measured."""
    columns = {scheme.name: i for i, scheme in enumerate(plan.menu)}
    found = {}
    for budget in plan.budgets:
        fitting = [c for c in candidates if c.weight_bytes <= budget and c.map_hash in kl]
        if fitting:
            best = min(fitting, key=lambda c: (kl[c.map_hash], c.weight_bytes))
            found[budget] = [np.array([columns[s] for s in best.schemes], dtype=np.intp)]
    return found
