"""The pipeline of a job: bank, sensitivity, controls, solving, measuring, choosing finalists.

Every result is committed as it arrives and looked up by its key before it is computed, and every
decision is a deterministic function of results: so a killed job that is started again walks the
same path, and computes only what is missing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.fronts import losses, reference_hash
from bitfront.plan import Plan, settled
from bitfront.progress import Progress
from bitfront.proposals import propose
from evaluation.arithmetic import DTYPES
from evaluation.texts import Text
from quantization.errors import BitfrontError, MeasurementError
from search.calibration import Calibration, fit_gain
from search.errors import SearchError
from search.problem import Problem
from sensitivity import ESTIMATORS, Experts, MeasuredMap, RawTable, Share, Work, merge
from store.database import Store
from store.queries import (
    QualityKey,
    candidates_of,
    find_share,
    key_of,
    measurements,
    open_job,
    save_candidates,
    save_measurement,
    save_model,
    save_share,
    update_job,
)
from store.tables import Candidate, Job, Measurement, Model, SensitivityShare
from workers.pool import Pool, Task
from workers.session import SessionSpec

Choice = NDArray[np.intp]
OpenPool = Callable[[SessionSpec], Pool]

BANK, REFERENCE = "quantizing every unit under every scheme", "the unquantized model"
SEARCH, HELDOUT = "candidates on the search text", "finalists on held-out text"
# how long tasks take in units of one candidate on one chunk, for the bar's first estimate only
BANK_WEIGHT, ESTIMATE_WEIGHT = 20, 12


@dataclass
class Run:
    """A job in progress: what the stages share."""

    plan: Plan
    store: Store
    pool: Pool
    progress: Progress
    job: Job

    @property
    def quality(self) -> QualityKey:
        """What all measurements of this job have in common."""
        return QualityKey(
            self.plan.checkpoint.weights_hash,
            self.plan.quantizer,
            self.plan.dtype,
        )

    @property
    def reference_hash(self) -> str:
        """Stands for the unquantized model among the map hashes."""
        return reference_hash(self.plan.checkpoint.weights_hash)


def run_search(
    plan: Plan, store: Store, open_pool: OpenPool, progress: Progress, cache: str | None = None
) -> int:
    """Run a job to its end, or go on with it; returns its number.

    Raises:
        BitfrontError: with what was measured safely in the store.
    """
    plan, why = settled(plan, store)
    job = open_planned(plan, store)
    if why:
        update_job(store, job.id, facts={"estimators_because": why})
    if job.state == "done":
        return job.id
    try:
        with open_pool(spec_of(plan, cache)) as pool:
            _run_stages(Run(plan, store, pool, progress, job))
    except (BitfrontError, SearchError) as error:
        update_job(store, job.id, state="failed", error=str(error))
        raise
    update_job(store, job.id, state="done")
    return job.id


def _run_stages(run: Run) -> None:
    plan = run.plan
    config = plan.config
    run.progress.expect(_expected_work(plan))
    with run.progress.stage(BANK, 1, BANK_WEIGHT) as advance:
        for _ in _values(run, [Task("prepare")]):
            advance(1)
    measure_reference(run)  # before the bank is mapped: it holds a float32 model for a moment
    problems = {name: plan.problem(score(run, name).mean) for name in config.estimators}
    candidates = _propose(run, problems)
    search = plan.texts["search"]

    def failed(candidate: Candidate) -> None:
        save_candidates(run.store, [candidate])

    measure(run, candidates, search, SEARCH, failed)
    candidates = _calibrate(run, candidates, problems)
    finalists = _choose_finalists(run, candidates)
    save_candidates(run.store, candidates)
    heldout = plan.texts["heldout"]
    measure(run, finalists, heldout, HELDOUT, failed)
    if not losses(run.store, run.quality, finalists, heldout.hashes):
        reasons = sorted({c.failure for c in candidates if c.failure})
        raise MeasurementError(f"no candidate could be measured: {'; '.join(reasons)}")


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
    for name in config.estimators:
        shares = ESTIMATORS[name].shares(units, config.texts.calibration.chunks)
        work[f"sensitivity: {name}"] = float(ESTIMATE_WEIGHT * len(shares))
    return work


def open_planned(plan: Plan, store: Store) -> Job:
    """The plan's job in the store, new or known, with what the plan knows of it."""
    checkpoint = plan.checkpoint
    save_model(
        store,
        Model(
            weights_hash=checkpoint.weights_hash,
            name=plan.name,
            revision=checkpoint.revision,
            layout=plan.layout.to_json(),
        ),
    )
    job = open_job(store, plan.key, checkpoint.weights_hash, plan.config.model_dump(mode="json"))
    facts = {
        "menu": [scheme.name for scheme in plan.menu],
        "bytes_table": plan.bytes_table.tolist(),
        "choices": [[scheme.name for scheme in row] for row in plan.choices],
        "dtype": plan.dtype,
        "quantizer": plan.quantizer,
        "transform": plan.folding.identity if plan.folding else None,
        "budgets": list(plan.budgets),
        "chunks": {role: list(text.hashes) for role, text in plan.texts.items()},
    }
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


def _values(run: Run, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
    """Run tasks whose errors end the job."""
    for outcome in run.pool.run(tasks):
        if outcome.error:
            raise outcome.error
        yield outcome.task, outcome.value


@dataclass(frozen=True)
class Scores:
    """An estimator's table over the whole calibration text.

    Args:
        mean: units x schemes, raw scores per token.
        experts: by unit, how many tokens each expert saw.
        seconds: of all tasks together, stored ones with what they took at the time.
    """

    mean: NDArray[np.float64]
    experts: dict[int, list[float]]
    seconds: float


def score(run: Run, estimator: str) -> Scores:
    """Run an estimator, but for the shares of its table that the store has."""
    plan = run.plan
    text = plan.texts["calibration"]
    shares = ESTIMATORS[estimator].shares(len(plan.layout.units), len(text.ids))
    provenance = {
        "weights_hash": plan.checkpoint.weights_hash,
        "quantizer": run.quality.quantizer,
        "dtype": plan.dtype,
        "text_hash": text.hash,
        "choices": key_of(*(",".join(s.name for s in row) for row in plan.choices)),
    }
    keys = {share: key_of(estimator, *provenance.values(), share) for share in shares}
    found = {share: row for share in shares if (row := find_share(run.store, keys[share]))}
    missing = [share for share in shares if share not in found]
    with run.progress.stage(f"sensitivity: {estimator}", len(missing), ESTIMATE_WEIGHT) as advance:
        tasks = [
            Task(
                "estimate", {"estimator": estimator, "chunks": text.ids, "share": s}, label=s,
                memory_bytes=forecast_bytes(plan, estimator, s),
            )
            for s in missing
        ]  # fmt: skip
        for outcome in run.pool.run(tasks):
            if outcome.error:
                raise outcome.error
            share, (table, seconds) = outcome.task.label, outcome.value
            found[share] = _share_row(keys[share], estimator, provenance, table, seconds)
            save_share(run.store, found[share])
            advance(1)
    whole = merge(_table(found[share]) for share in shares)
    table = whole.mean()
    bad = ~np.isfinite(table) & plan.offered
    if bad.any():
        unit = plan.layout.units[int(np.argwhere(bad)[0][0])].name
        raise MeasurementError(
            f"the estimator {estimator} has no finite score for {unit} (and {int(bad.sum()) - 1} "
            "other entries); try --dtype float32, or leave it out of the job's estimators"
        )
    experts = {unit: own.tokens.tolist() for unit, own in whole.experts.items()}
    return Scores(table, experts, sum(found[share].seconds for share in shares))


def forecast_bytes(plan: Plan, estimator: str, share: Share) -> int:
    """The memory that a task of an estimator will need on a worker."""
    itemsize = DTYPES[plan.dtype].itemsize
    work = Work(plan.layout, plan.texts["calibration"].ids.shape[1], itemsize)
    return ESTIMATORS[estimator].forecast_bytes(plan.choices, share, work)


def _share_row(
    key: str, estimator: str, provenance: dict[str, str], table: RawTable, seconds: float
) -> SensitivityShare:
    experts = {
        str(unit): {"sums": _plain(own.sums), "tokens": own.tokens.tolist()}
        for unit, own in table.experts.items()
    }
    return SensitivityShare(
        key=key, estimator=estimator, provenance=provenance, sums=_plain(table.sums),
        tokens=table.tokens.tolist(), experts=experts,
        maps=[asdict(measured) for measured in table.maps], seconds=seconds,
    )  # fmt: skip


def _plain(sums: NDArray[np.float64]) -> list[list[float | None]]:
    """As JSON has it: no NaN."""
    return [[None if np.isnan(x) else float(x) for x in row] for row in sums]


def _table(row: SensitivityShare) -> RawTable:
    experts = {
        int(unit): Experts(np.array(own["sums"], dtype=np.float64), np.array(own["tokens"]))
        for unit, own in (row.experts or {}).items()
    }
    maps = tuple(MeasuredMap(**{**m, "choice": tuple(m["choice"])}) for m in row.maps or ())
    return RawTable(np.array(row.sums, dtype=np.float64), np.array(row.tokens), experts, maps)


def _propose(run: Run, problems: dict[str, Problem]) -> list[Candidate]:
    """The job's candidates; those that failed before aren't tried again in this job."""
    failures = {c.map_hash: c.failure for c in candidates_of(run.store, run.job.id)}
    candidates = propose(run.plan, run.job.id, problems)
    for candidate in candidates:
        candidate.failure = failures.get(candidate.map_hash)
    save_candidates(run.store, candidates)
    return candidates


def measure(
    run: Run,
    candidates: Sequence[Candidate],
    text: Text,
    label: str,
    failed: Callable[[Candidate], None] = lambda _: None,
) -> None:
    """Measure candidates on all chunks of a text, but for what the store has.

    One that can't be measured gets its `failure`, and `failed` is told.
    """
    tasks = []
    known = measurements(
        run.store,
        [run.quality.of(c.map_hash, chunk) for c in candidates for chunk in text.hashes],
    )
    # chunk by chunk: what a kill leaves behind can then be compared on the same chunks
    for index, chunk in enumerate(text.hashes):
        for candidate in candidates:
            key = run.quality.of(candidate.map_hash, chunk)
            if key not in known and candidate.failure is None:
                arguments = {"schemes": tuple(candidate.schemes), "ids": text.ids[index]}
                tasks.append(Task("measure", arguments, label=(candidate, chunk)))
    with run.progress.stage(label, len(tasks)) as advance:
        for outcome in run.pool.run(tasks):
            candidate, chunk = outcome.task.label
            if isinstance(outcome.error, MeasurementError):
                candidate.failure = str(outcome.error)
                failed(candidate)
            elif outcome.error:
                raise outcome.error
            else:
                _save(run, candidate.map_hash, chunk, outcome.value)
            advance(1)


def measure_reference(run: Run) -> None:
    """The unquantized model's own likelihood on held-out text, and the arithmetic's noise."""
    text = run.plan.texts["heldout"]
    keys = {chunk: run.quality.of(run.reference_hash, chunk) for chunk in text.hashes}
    known = measurements(run.store, list(keys.values()))
    tasks = [
        Task("measure", {"schemes": None, "ids": text.ids[i]}, label=chunk)
        for i, chunk in enumerate(text.hashes)
        if keys[chunk] not in known
    ]
    if "noise_floor" not in run.job.facts:
        tasks.append(Task("noise_floor", {"ids": run.plan.texts["search"].ids[0]}))
    with run.progress.stage(REFERENCE, len(tasks)) as advance:
        for task, value in _values(run, tasks):
            if task.method == "noise_floor":
                run.job = update_job(run.store, run.job.id, facts={"noise_floor": value})
            else:
                _save(run, run.reference_hash, task.label, value)
            advance(1)


def _save(run: Run, map_hash: str, chunk: str, value: object) -> None:
    save_measurement(
        run.store,
        Measurement(
            key=run.quality.of(map_hash, chunk),
            map_hash=map_hash,
            chunk_hash=chunk,
            **vars(run.quality),
            **vars(value),
        ),
    )


def _calibrate(
    run: Run, candidates: list[Candidate], problems: dict[str, Problem]
) -> list[Candidate]:
    """Fit each estimator's gain on the search text; predict with the one that fits best."""
    plan = run.plan
    measured = losses(run.store, run.quality, candidates, plan.texts["search"].hashes)
    columns = {scheme.name: i for i, scheme in enumerate(plan.menu)}
    choices = [np.array([columns[s] for s in c.schemes], dtype=np.intp) for c in candidates]
    kl = np.array([m.kl.mean if (m := measured.get(c.map_hash)) else np.nan for c in candidates])
    raw = {
        name: np.array([problem.total_loss(choice) for choice in choices])
        for name, problem in problems.items()
    }
    floor = 2 * (run.job.facts.get("noise_floor") or 0.0)
    fits: dict[str, Calibration] = {name: fit_gain(raw[name], kl, floor) for name in problems}
    best = min(fits, key=lambda name: np.nan_to_num(fits[name].residual, nan=np.inf))
    for candidate, score in zip(candidates, raw[best], strict=True):
        candidate.predicted_kl = fits[best].predict(float(score)) if fits[best].maps else None
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


def _choose_finalists(run: Run, candidates: list[Candidate]) -> list[Candidate]:
    """At each budget the map that measured best on the search text; and all controls."""
    measured = losses(run.store, run.quality, candidates, run.plan.texts["search"].hashes)
    chosen = {c.map_hash for c in candidates if c.control}
    for budget in run.plan.budgets:
        fitting = [c for c in candidates if c.weight_bytes <= budget and c.map_hash in measured]
        if fitting:
            best = min(fitting, key=lambda c: (measured[c.map_hash].kl.mean, c.weight_bytes))
            chosen.add(best.map_hash)
    for candidate in candidates:
        candidate.finalist = candidate.map_hash in chosen
    return [candidate for candidate in candidates if candidate.finalist]
