"""`bitfront apply`: somebody's map put onto a model and measured, as a point of a job's front.

It joins the newest job of the model that a map of its kind can join, or one that is named, and is
measured on that job's texts with its quantizer. Without a job it begins one.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitfront.config import DEMO, ConfigError, load_config
from bitfront.console import errors
from bitfront.demo import demo_model
from bitfront.fronts import GIVEN, Front, load_front
from bitfront.measuring import measure, measure_reference, sharing
from bitfront.pipeline import HELDOUT, SEARCH, open_planned, spec_of
from bitfront.plan import Plan, admitting, make_plan, plan_again
from bitfront.preparing import prepare
from bitfront.progress import Lines, Progress, RichProgress
from bitfront.proposals import candidate_of
from bitfront.run import Run
from bitfront.searching import open_pool
from engines.foreign import Foreign, read_map
from quantization.adapter import describe
from quantization.checkpoints import resolve
from quantization.errors import BitfrontError, ModelError
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout
from store.database import Store
from store.queries import (
    candidates_of,
    find_job,
    find_model,
    list_jobs,
    save_candidates,
    update_job,
)
from store.tables import Candidate, Job, now


def apply(
    store: Store, file: Path, model: str, job_number: int | None, address: str, text: str | None
) -> tuple[Front, int]:
    """Measure a map; the front that it is on now, and its point there.

    Args:
        store: where jobs are.
        file: the map, in any form that `engines/foreign.py` reads.
        model: hub id, folder, GGUF file or `demo`.
        job_number: whose front it joins; by default the newest that it can.
        address: of the Ray cluster.
        text: one source for the texts of a job that begins here.

    Raises:
        BitfrontError: a map that isn't this model's or this job's.
    """
    checkpoint = resolve(demo_model() if model == DEMO else model)
    layout = describe(checkpoint).split()
    foreign = read_map(
        file, checkpoint, layout.with_caches("apart") if layout.knows_caches else layout
    )
    known = _job(store, job_number, checkpoint.weights_hash, foreign)
    base = (
        plan_again(known, find_model(store, known.model_hash))
        if known
        else make_plan(load_config(model, None, _overrides(foreign, text)))
    )
    if known and base.chunks != known.facts["chunks"]:
        raise ConfigError(
            f"the texts of job {known.id} have changed since it measured on them, so '{file}' can't "
            "join it; name another job, or search again"
        )
    if foreign.caches and not base.caches.any():
        raise ConfigError(
            f"'{file}' quantizes the KV cache, which this job leaves as it is; name a job that "
            "chooses its formats (search with --kv-menu), or leave --job out for a new one"
        )
    schemes = _schemes(base.layout, foreign, file)
    if base.engine:  # a map that says bits leaves the type of the scales open
        schemes = [base.engine.variant(scheme) for scheme in schemes]
    _check_served(base, schemes)
    job = known or open_planned(base, store)
    given = _Given(admitting(base, schemes), base, job, schemes, file)
    try:
        with (RichProgress if errors.is_terminal else Lines)(errors) as progress:
            point = _measured(given, store, address, progress)
    except BitfrontError as error:
        if not known:
            update_job(store, job.id, state="failed", error=str(error))
        raise
    if not known:
        update_job(store, job.id, state="done")
    return load_front(store, find_job(store, job.id)), point


def _job(store: Store, number: int | None, weights_hash: str, foreign: Foreign) -> Job | None:
    """The job to join."""
    if number is not None:
        job = find_job(store, number)
        if job.model_hash != weights_hash:
            raise ConfigError(f"job {job.id} is of another model; leave --job out for a new one")
        if job.state != "done":
            raise ConfigError(f"job {job.id} is not done; run its search to the end first")
        return job
    for job, _ in list_jobs(store):
        engine = (job.config.get("serving") or {}).get("engine")
        cached = bool((job.config.get("menu") or {}).get("cache"))
        fits = foreign.engine in (None, engine) and (cached or not foreign.caches)
        if job.model_hash == weights_hash and job.state == "done" and fits:
            return job
    return None


def _overrides(foreign: Foreign, text: str | None) -> dict[str, Any]:
    """Of a job whose menu are the map's formats."""
    weights = {name: f for name, f in foreign.formats.items() if name not in foreign.caches}
    found = sorted({*weights.values(), FULL_PRECISION})
    cache = sorted({*foreign.caches.values(), FULL_PRECISION}) if foreign.caches else None
    texts = {f"texts.{role}.source": text for role in ("calibration", "search", "heldout")}
    return {
        "menu": {"schemes": found, "pinned": {}}, "menu.cache": cache,
        "serving.engine": foreign.engine, **texts,
    }  # fmt: skip


def _schemes(layout: Layout, foreign: Foreign, file: Path) -> list[Scheme]:
    """One for each unit; what the map doesn't speak of stays in full precision."""
    known = {site.name for unit in layout.units for site in unit.sites}
    if not known & set(foreign.formats):
        raise ModelError(f"'{file}' speaks of no layer of this model, such as {min(known)}")
    schemes = []
    for unit in layout.units:
        found = {foreign.formats.get(site.name, FULL_PRECISION) for site in unit.sites}
        if len(found) > 1 and len(unit.matrices) > 1:
            raise ModelError(
                f"'{file}' has {' and '.join(sorted(found))} in {unit.name}, which this job decides "
                "as one; name a job with an engine that fuses nothing (llama.cpp, torch) by --job"
            )
        # a tied matrix is stored as its embedding
        schemes.append(Scheme.stored(foreign.formats.get(unit.sites[0].name, FULL_PRECISION)))
    return schemes


def _check_served(plan: Plan, schemes: Sequence[Scheme]) -> None:
    if plan.engine is None:
        return
    for unit, scheme in zip(plan.layout.units, schemes, strict=True):
        if why := plan.engine.unit_refusal(unit, scheme):
            raise ConfigError(f"{plan.engine.name} can't serve the map: {unit.name}: {why}")


@dataclass(frozen=True)
class _Given:
    """A map in a job.

    Args:
        plan: the job's, with the map's schemes.
        base: the job's as it is.
    """

    plan: Plan
    base: Plan
    job: Job
    schemes: Sequence[Scheme]
    file: Path

    def candidate(self, known: Sequence[Candidate]) -> Candidate:
        """The map among the job's, numbered behind them if it is new."""
        plan, base = self.plan, self.base
        choice = np.array([plan.menu.index(scheme) for scheme in self.schemes], dtype=np.intp)
        made = candidate_of(plan, self.job.id, choice, f"given: {self.file.name}", 0, GIVEN)
        rows = np.flatnonzero(base.open_units)  # as for all other points of the job
        taken = int(plan.bytes_table[rows, choice[rows]].sum())
        made.average_bits = 8 * taken / base.quantizable_numel
        made.point = 1 + max((c.point for c in known), default=0)
        found = next((c for c in known if c.map_hash == made.map_hash), made)
        found.finalist = True
        return found


def _measured(given: _Given, store: Store, address: str, progress: Progress) -> int:
    """Measure the map on the job's texts; its point."""
    base = given.base
    candidate = given.candidate(candidates_of(store, given.job.id))
    spec = spec_of(given.plan, os.environ.get("BITFRONT_CACHE"))
    opener = partial(open_pool, address=address, workers=None)
    with sharing(opener, spec, store, given.job.id) as pool:
        prepare(pool, progress)
        run = Run(base, store, pool, progress, given.job)
        measure_reference(run)
        for text, label in ((base.texts["search"], SEARCH), (base.texts["heldout"], HELDOUT)):
            measure(run, [candidate], text, label)
    if candidate.failure:
        raise ConfigError(f"the map can't be measured: {candidate.failure}")
    save_candidates(store, [candidate])
    update_job(store, given.job.id, updated_at=now())  # its front is another now
    return candidate.point
