"""The pipeline of a job: bank, sensitivity, controls, solving, measuring, choosing finalists.

Every result is committed as it arrives and looked up by its key before it is computed, and every
decision is a deterministic function of results: so a killed job that is started again walks the
same path, and computes only what is missing.
"""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from bitfront.budgets import sharing_in, working_bytes
from bitfront.fronts import INTERACTIONS, is_later, losses
from bitfront.interacting import PAIRS, interact
from bitfront.measuring import REFERENCE, OpenPool, measure, measure_reference, sharing
from bitfront.plan import Plan
from bitfront.preparing import BANK, BANK_WEIGHT, prepare
from bitfront.profiling import MAP_WEIGHT
from bitfront.progress import Clocked, Progress
from bitfront.proposals import choice_of, propose
from bitfront.refining import REFINE, SLOPES_WEIGHT, refine, starts_of
from bitfront.resolving import keep_tables
from bitfront.run import Run
from bitfront.scoring import ESTIMATE_WEIGHT, experts_seen, score
from bitfront.settling import settled
from bitfront.timing import FINALISTS, check_times, corrected, with_times
from quantization.errors import BitfrontError, MeasurementError
from search.calibration import Calibration, fit_gain
from search.errors import SearchError
from search.problem import Problem
from sensitivity import ESTIMATORS
from store.database import Store
from store.queries import (
    candidates_of,
    end_job,
    open_job,
    plan_job,
    save_candidates,
    save_model,
    update_job,
)
from store.tables import Candidate, Job, Model
from workers.session import SessionSpec

Choice = NDArray[np.intp]
PAIRED = "maps with interactions on the search text"
REFINED = "refined maps on the whole search text"
SEARCH, HELDOUT = "candidates on the search text", "finalists on held-out text"
PATIENCE_S = 900.0
"""How long a driver waits for a database that is away."""


def run_search(
    plan: Plan,
    store: Store,
    open_pool: OpenPool,
    progress: Progress,
    cache: str | None = None,
    submitted: int | None = None,
) -> int:
    """Run a job to its end, or go on with it; returns its number.

    Args:
        plan: of the job.
        store: where it is kept; a driver is patient with a database that is away.
        open_pool: of workers.
        progress: is told how far it is.
        cache: the driver's `$BITFRONT_CACHE`, where it has one.
        submitted: the job's number, where somebody has submitted it and this is its driver.

    Raises:
        BitfrontError: with what was measured safely in the store.
    """
    store.away_patience_s = PATIENCE_S
    plan = settled(plan, store)
    job = open_planned(plan, store, submitted)
    if job.state == "done":
        return job.id
    try:
        with sharing(open_pool, spec_of(plan, cache), store, job.id) as pool:
            clocked = Clocked(progress, store, job.id)
            _run_stages(with_times(Run(plan, store, pool, clocked, job)))
    except (BitfrontError, SearchError) as error:
        end_job(store, job.id, "failed", str(error))
        raise
    except KeyboardInterrupt:
        if submitted is None:  # nobody is at it any more, until the same command is given again
            end_job(store, job.id, "cancelled")
        raise
    end_job(store, job.id, "done")
    return job.id


def _run_stages(run: Run) -> None:
    plan = run.plan
    config = plan.config
    run.progress.expect(_expected_work(plan))
    prepare(run.pool, run.progress)
    measure_reference(run)  # before the bank is mapped: it holds a float32 model for a moment
    scores = {name: score(run, name) for name in config.estimators}
    problems = {name: plan.problem(scored.mean) for name, scored in scores.items()}
    if experts := experts_seen(plan, scores.values()):
        run.job = update_job(run.store, run.job.id, facts={"experts": experts})
    problems = corrected(run, problems)
    plan = run.plan
    candidates = _propose(run, problems)
    search = plan.texts["search"]

    def failed(candidate: Candidate) -> None:
        save_candidates(run.store, [candidate])

    measure(run, candidates, search, SEARCH, failed)
    candidates = _calibrate(run, candidates, problems)
    for stage, label in ((_interact, PAIRED), (_refine, REFINED)):
        if later := stage(run, candidates, problems):
            candidates += later
            measure(run, later, search, label, failed)
            candidates = _calibrate(run, candidates, problems)
    finalists = _choose_finalists(run, candidates)
    save_candidates(run.store, candidates)
    heldout = plan.texts["heldout"]
    measure(run, finalists, heldout, HELDOUT, failed)
    if not losses(run.store, run.quality, finalists, heldout.hashes):
        reasons = sorted({c.failure for c in candidates if c.failure})
        raise MeasurementError(f"no candidate could be measured: {'; '.join(reasons)}")
    if plan.times:
        check_times(run, plan.times, finalists)
    keep_tables(run, problems)


def _expected_work(plan: Plan) -> dict[str, float]:
    """Each stage's probable work, in measurements of one candidate on one chunk."""
    config, units = plan.config, len(plan.layout.units)
    controls = len(config.menu.schemes) + config.random_controls
    proposals = controls + len(plan.budgets) * len(config.estimators)
    work = {
        BANK: float(BANK_WEIGHT),
        REFERENCE: float(config.texts.heldout.chunks),
        SEARCH: float(proposals * config.texts.search.chunks),
        HELDOUT: float((controls + len(plan.budgets)) * config.texts.heldout.chunks),
    }
    later = len(plan.budgets) * config.texts.search.chunks
    if config.interactions:
        work |= {PAIRS: float(ESTIMATE_WEIGHT), PAIRED: float(later)}
    if config.refinement.measurements:
        work[REFINED] = float(later)
        work[REFINE] = float(SLOPES_WEIGHT * config.refinement.measurements)
    if plan.times and plan.times.profile:
        work[FINALISTS] = MAP_WEIGHT * (controls + len(plan.budgets))
    for name in config.estimators:
        shares = ESTIMATORS[name].shares(units, config.texts.calibration.chunks)
        work[f"sensitivity: {name}"] = float(ESTIMATE_WEIGHT * len(shares))
    return work


def open_planned(plan: Plan, store: Store, submitted: int | None = None) -> Job:
    """The plan's job in the store, new or known or submitted, with what the plan knows of it."""
    checkpoint = plan.checkpoint
    save_model(
        store,
        Model(
            weights_hash=checkpoint.weights_hash,
            name=plan.name,
            revision=checkpoint.revision,
            layout=plan.described.to_json(),
        ),
    )
    known = plan.key, checkpoint.weights_hash, plan.config.model_dump(mode="json")
    job = open_job(store, *known) if submitted is None else plan_job(store, submitted, *known)
    facts = {
        "menu": [scheme.name for scheme in plan.menu],
        "bytes_table": plan.bytes_table.tolist(),
        "choices": [[scheme.name for scheme in row] for row in plan.choices],
        "dtype": plan.dtype,
        "quantizer": plan.quantizer,
        "transform": plan.folding.identity if plan.folding else None,
        "budgets": list(plan.budgets),
        "split": plan.layout.weights != plan.described.units,
        "estimators": list(plan.config.estimators),
        "chunks": plan.chunks,
    }
    if plan.placeholders:
        facts["placeholders"] = plan.placeholders
    if plan.caches.any():
        facts["caches"] = plan.engine.cache_sharing if plan.engine else "apart"
    if plan.engine or plan.config.serving.max_memory_bytes or plan.caches.any():
        wanted = plan.config.serving
        workload = {"batch": wanted.batch, "context": wanted.context}
        facts["memory"] = {"workload": workload, "activation_bytes": working_bytes(plan)}
        if wanted.tensor_parallel > 1:
            workload["tensor_parallel"] = wanted.tensor_parallel
            facts["memory"]["sharing"] = asdict(sharing_in(plan))
    if plan.because:  # an audit of the job plans it anew, and doesn't ask again
        facts |= {"estimators_because": plan.because, "evidence": plan.evidence}
    return update_job(store, job.id, facts=facts)


def spec_of(plan: Plan, cache: str | None) -> SessionSpec:
    """What workers need to know of a plan."""
    return SessionSpec(
        checkpoint=plan.checkpoint,
        layout=plan.layout,
        quantizer=plan.config.quantizer,
        choices=tuple(tuple(scheme.name for scheme in row) for row in plan.choices),
        dtype=plan.dtype,
        threads=1,
        cache=cache,
        calibration=plan.texts["calibration"].ids,
        statistics=plan.statistics,
        folding=plan.folding,
        imatrix=plan.imatrix,
        packed=plan.packed,
    )


def _propose(run: Run, problems: dict[str, Problem]) -> list[Candidate]:
    """The job's candidates; those that failed before aren't tried again in this job."""
    failures = {c.map_hash: c.failure for c in candidates_of(run.store, run.job.id)}
    candidates = propose(run.plan, run.job.id, problems)
    for candidate in candidates:
        candidate.failure = failures.get(candidate.map_hash)
    save_candidates(run.store, candidates)
    return candidates


def _calibrate(
    run: Run, candidates: list[Candidate], problems: dict[str, Problem]
) -> list[Candidate]:
    """Fit each estimator's gain on the search text; predict with the one that fits best."""
    plan = run.plan
    measured = losses(run.store, run.quality, candidates, plan.texts["search"].hashes)
    choices = [choice_of(plan, candidate) for candidate in candidates]
    kl = np.array([m.kl.mean if (m := measured.get(c.map_hash)) else np.nan for c in candidates])
    raw = {
        name: np.array([problem.total_loss(choice) for choice in choices])
        for name, problem in problems.items()
    }
    floor = 2 * (run.job.facts.get("noise_floor") or 0.0)
    fits: dict[str, Calibration] = {name: fit_gain(raw[name], kl, floor) for name in problems}
    best = min(fits, key=lambda name: np.nan_to_num(fits[name].residual, nan=np.inf))
    for candidate, raw_loss in zip(candidates, raw[best], strict=True):
        candidate.predicted_kl = fits[best].predict(float(raw_loss)) if fits[best].maps else None
    facts = {
        "predicts": best,
        "calibration": {
            name: {
                "unit": ESTIMATORS[name].unit,
                **{k: v if np.isfinite(v) else None for k, v in vars(fit).items()},
            }
            for name, fit in fits.items()
        },
    }
    run.job = update_job(run.store, run.job.id, facts=facts)
    return candidates


def _interact(
    run: Run, candidates: Sequence[Candidate], problems: dict[str, Problem]
) -> list[Candidate]:
    """Maps of the problem with pairs that are new; a resumed job has them: the solver's time varies."""
    if not run.plan.config.interactions:
        return []
    if "interactions" in run.job.facts:
        stored = candidates_of(run.store, run.job.id)
        return [c for c in stored if c.origin.startswith(INTERACTIONS)]
    problem, known = problems[run.job.facts["predicts"]], {c.map_hash for c in candidates}
    found, facts = interact(run, problem, known)
    new = _numbered(run, candidates, found)
    run.job = update_job(run.store, run.job.id, facts={"interactions": facts})
    return new


def _refine(
    run: Run, candidates: Sequence[Candidate], problems: dict[str, Problem]
) -> list[Candidate]:
    """Refined maps that are new."""
    problem = problems[run.job.facts["predicts"]]
    measured = losses(run.store, run.quality, candidates, run.plan.texts["search"].hashes)
    kl = {map_hash: found.kl.mean for map_hash, found in measured.items()}
    found = refine(run, problem, starts_of(run.plan, candidates, kl))
    return _numbered(run, candidates, found)


def _numbered(
    run: Run, candidates: Sequence[Candidate], later: Sequence[Candidate]
) -> list[Candidate]:
    """Those of a later stage that are new, numbered after those of the job, and saved."""
    known, new = {c.map_hash for c in candidates}, []
    for candidate in later:
        if candidate.map_hash not in known:
            known.add(candidate.map_hash)
            candidate.point = len(known)
            new.append(candidate)
    save_candidates(run.store, new)
    return new


def _choose_finalists(run: Run, candidates: list[Candidate]) -> list[Candidate]:
    """At each budget the map that measured best on the search text; and all controls.

    Where a later stage found it, the best of those before too, to say what that stage bought.
    """
    measured = losses(run.store, run.quality, candidates, run.plan.texts["search"].hashes)
    chosen = {c.map_hash for c in candidates if c.control}
    for budget in run.plan.budgets:
        fitting = [c for c in candidates if c.weight_bytes <= budget and c.map_hash in measured]
        if fitting:
            order = sorted(fitting, key=lambda c: (measured[c.map_hash].kl.mean, c.weight_bytes))
            chosen.add(order[0].map_hash)
            if is_later(order[0]):
                chosen.update([c.map_hash for c in order if not is_later(c)][:1])
    for candidate in candidates:
        candidate.finalist = candidate.map_hash in chosen
    return [candidate for candidate in candidates if candidate.finalist]
