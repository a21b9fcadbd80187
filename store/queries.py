"""Reading and writing the store: small functions over a `Store`, each its own transaction."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError

from store.database import Store, lasting
from store.errors import NotFoundError
from store.tables import (
    Candidate,
    CellTime,
    Job,
    MapTime,
    Measurement,
    Model,
    SensitivityShare,
    SolverTables,
    now,
)

Keyed = TypeVar("Keyed", Measurement, CellTime, MapTime)
KEYS_A_QUERY = 500  # SQLite allows 999 variables in a statement


def key_of(*parts: object) -> str:
    """SHA-256 over the parts that identify a task."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()


def reference_hash(weights_hash: str) -> str:
    """Stands for the unquantized model among the map hashes."""
    return key_of("reference", weights_hash)


@dataclass(frozen=True)
class QualityKey:
    """What a measurement of quality depends on, besides map and chunk."""

    weights_hash: str
    quantizer: str
    dtype: str

    def of(self, map_hash: str, chunk_hash: str) -> str:
        """The measurement's primary key."""
        return key_of(self.weights_hash, map_hash, self.quantizer, chunk_hash, self.dtype)


@lasting
def save_model(store: Store, model: Model) -> None:
    """Insert or refresh a model."""
    with store.session() as session:
        session.merge(model)


@lasting
def open_job(store: Store, key: str, weights_hash: str, config: dict[str, Any]) -> Job:
    """The job with this key, new or resumed."""
    with store.session() as session:
        job = session.scalar(select(Job).where(Job.key == key))
        if job is None:
            job = Job(key=key, weights_hash=weights_hash, state="running", config=config, facts={})
            session.add(job)
        else:
            job.updated_at, job.config = now(), config  # asked for again: the latest, where it lies
            if job.state in {"failed", "cancelled"}:
                job.launch = None  # it is this shell's now, and no server's
            if job.state != "done":
                job.state, job.error = "running", None
        session.flush()
        return job


@lasting
def plan_job(store: Store, job_id: int, key: str, weights_hash: str, config: dict[str, Any]) -> Job:
    """A submitted job that a driver has planned.

    Where another job asks the same, it keeps its own key: what was measured is found by both.
    """
    with store.session() as session:
        job = session.get_one(Job, job_id)
        job.weights_hash, job.config = weights_hash, config
        if session.scalar(select(Job.id).where(Job.key == key)) is None:
            job.key = key
        session.flush()
        return job


@lasting
def end_job(store: Store, job_id: int, state: str, error: str | None = None) -> None:
    """A running job is `done` or `failed`; one that was cancelled meanwhile stays so."""
    with store.session() as session:
        ended = update(Job).where(Job.id == job_id, Job.state == "running")
        session.execute(ended.values(state=state, error=error, updated_at=now()))


@lasting
def update_job(
    store: Store, /, job_id: int, facts: dict[str, Any] | None = None, **columns: Any
) -> Job:
    """Set columns; `facts` are added to those that the job has."""
    with store.session() as session:
        job = session.get_one(Job, job_id, with_for_update=True)
        if facts:
            job.facts = {**job.facts, **facts}
        for name, value in columns.items():
            setattr(job, name, value)
        return job


@lasting
def add_seconds(store: Store, job_id: int, stage: str, seconds: float, steps: int) -> None:
    """Add to what a stage of a job took, over all its runs."""
    with store.session() as session:
        job = session.get_one(Job, job_id, with_for_update=True)
        took = dict(job.facts.get("stages", {}))
        before = took.get(stage, {"seconds": 0.0, "steps": 0})
        took[stage] = {
            "seconds": before["seconds"] + seconds, "steps": before["steps"] + steps,
        }  # fmt: skip
        job.facts = {**job.facts, "stages": took}


@lasting
def find_job(store: Store, job_id: int | None) -> Job:
    """A job by number; the latest one for None.

    Raises:
        NotFoundError: no such job, or none at all.
    """
    with store.reading() as session:
        if job_id is None:
            job = session.scalar(select(Job).order_by(Job.updated_at.desc(), Job.id.desc()))
            if job is None:
                raise NotFoundError(
                    f"no jobs in the store {store.url} yet; start one: bitfront search demo"
                )
            return job
        found = session.get(Job, job_id)
        if found is None:
            known = session.scalars(select(Job.id).order_by(Job.id.desc()).limit(8)).all()
            raise NotFoundError(
                f"no job {job_id} in the store; there are {', '.join(map(str, known)) or 'none'}"
            )
        return found


@lasting
def audited_job(store: Store, weights_hash: str, quantizer: str, menu: Sequence[str]) -> Job | None:
    """The job with the latest audit of this model under this quantizer and menu."""
    with store.reading() as session:
        jobs = session.scalars(select(Job).where(Job.weights_hash == weights_hash))
        fitting = [
            job
            for job in jobs
            if "audit" in job.facts
            and job.facts["quantizer"] == quantizer
            and set(job.facts["menu"]) == set(menu)
        ]
        return max(fitting, key=lambda job: str(job.facts["audit"]["audited_at"]), default=None)


@lasting
def list_jobs(store: Store) -> list[tuple[Job, str]]:
    """All jobs with their model's name, newest first."""
    with store.reading() as session:
        rows = session.execute(
            select(Job, Model.name)
            .join(Model, isouter=True)
            .order_by(Job.updated_at.desc(), Job.id.desc())
        )
        return [(job, name or str(job.config["model"])) for job, name in rows]


@lasting
def find_model(store: Store, weights_hash: str) -> Model:
    """The model of a job."""
    with store.reading() as session:
        return session.get_one(Model, weights_hash)


@lasting
def model_name(store: Store, job: Job) -> str:
    """The name of a job's model: as its driver found it, or as it was asked for."""
    if job.weights_hash is None:
        return str(job.config["model"])
    with store.reading() as session:  # without its layout
        query = select(Model.name).where(Model.weights_hash == job.weights_hash)
        return session.scalars(query).one()


@lasting
def list_models(store: Store) -> list[tuple[str, str, int]]:
    """Names and hashes of the models that jobs are of, and how many jobs."""
    query = (
        select(Model.name, Model.weights_hash, func.count())
        .join(Job)
        .group_by(Model.name, Model.weights_hash)
        .order_by(Model.name)
    )
    with store.reading() as session:
        return [(name, weights_hash, jobs) for name, weights_hash, jobs in session.execute(query)]


@lasting
def save_candidates(store: Store, candidates: Sequence[Candidate]) -> None:
    """Insert or refresh candidates."""
    with store.session() as session:
        for candidate in candidates:
            session.merge(candidate)


@lasting
def candidates_of(store: Store, job_id: int) -> list[Candidate]:
    """A job's candidates in the order in which they were proposed."""
    with store.reading() as session:
        query = select(Candidate).where(Candidate.job_id == job_id).order_by(Candidate.point)
        return list(session.scalars(query))


@lasting
def save_measurement(store: Store, measurement: Measurement) -> None:
    """Insert a measurement; one that is there already stays as it was.

    Two drivers of the same job may arrive with the same one at the same time: the first counts.
    """
    with store.session() as session, suppress(IntegrityError), session.begin_nested():
        if session.get(Measurement, measurement.key) is None:
            session.add(measurement)


@lasting
def measurements(store: Store, keys: Sequence[str]) -> dict[str, Measurement]:
    """Those of the keys that are in the store."""
    return rows_of(store, Measurement, keys)


class Sums(NamedTuple):
    """What a loss is made of, on one chunk; see `Measurement`."""

    kl_sum: float
    nll_sum: float
    tokens: int


@lasting
def measured_sums(store: Store, keys: Sequence[str]) -> dict[str, Sums]:
    """The sums of those of the keys that are in the store: fronts need hundreds of rows."""
    columns = (Measurement.key, Measurement.kl_sum, Measurement.nll_sum, Measurement.tokens)
    found: dict[str, Sums] = {}
    with store.reading() as session:
        for start in range(0, len(keys), KEYS_A_QUERY):
            part = keys[start : start + KEYS_A_QUERY]
            rows = session.execute(select(*columns).where(Measurement.key.in_(part)))
            found |= {key: Sums(kl, nll, tokens) for key, kl, nll, tokens in rows}
    return found


@lasting
def rows_of(store: Store, table: type[Keyed], keys: Sequence[str]) -> dict[str, Keyed]:
    """The rows of a table that have one of the keys, by key."""
    found: dict[str, Keyed] = {}
    with store.reading() as session:
        for start in range(0, len(keys), KEYS_A_QUERY):
            part = keys[start : start + KEYS_A_QUERY]
            for row in session.scalars(select(table).where(table.key.in_(part))):
                found[row.key] = row
    return found


@lasting
def known_keys(store: Store, table: Any, keys: Sequence[str]) -> set[str]:
    """Those of the keys that a table has."""
    found: set[str] = set()
    with store.reading() as session:
        for start in range(0, len(keys), KEYS_A_QUERY):
            part = keys[start : start + KEYS_A_QUERY]
            found.update(session.scalars(select(table.key).where(table.key.in_(part))))
    return found


@lasting
def find_share(store: Store, key: str) -> SensitivityShare | None:
    """A task's part of a sensitivity table, if it was computed before."""
    with store.reading() as session:
        return session.get(SensitivityShare, key)


@lasting
def save_share(store: Store, share: SensitivityShare) -> None:
    """Keep a task's part of a sensitivity table."""
    with store.session() as session:
        session.merge(share)


@lasting
def save_tables(store: Store, job_id: int, tables: dict[str, Any]) -> None:
    """Keep what a job's problem can be solved with again."""
    with store.session() as session:
        session.merge(SolverTables(job_id=job_id, tables=tables))


@lasting
def find_tables(store: Store, job_id: int) -> dict[str, Any] | None:
    """What a job's problem can be solved with again."""
    with store.reading() as session:
        found = session.get(SolverTables, job_id)
        return found.tables if found else None
