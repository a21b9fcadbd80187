"""Jobs and exports that are submitted to be run by whoever serves the store."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlalchemy import func, or_, select
from sqlalchemy.orm import defer

from store.database import Store, lasting
from store.errors import ConflictError, NotFoundError
from store.queries import find_job, key_of
from store.tables import (
    Candidate,
    CellTime,
    Claim,
    ExportOrder,
    Job,
    MapTime,
    Measurement,
    Model,
    SensitivityShare,
    now,
)

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
STATES = (QUEUED, RUNNING, DONE, FAILED, CANCELLED)
OPEN = (QUEUED, RUNNING)
MODEL_NAME = func.coalesce(Model.name, Job.config["model"].as_string())
"""As its driver found it, or as it was asked for."""


def submit_job(
    store: Store,
    config: dict[str, Any],
    launch: dict[str, Any],
    submitted_by: str | None = None,
    once: str | None = None,
) -> Job:
    """A new job that waits for a driver.

    Args:
        store: where it is kept.
        config: of the job, as validated.
        launch: what its driver is started with: workers and what each needs.
        submitted_by: name of the token.
        once: a submission with the same word is the same job, not another one.
    """
    return _submitted(
        store, config, launch, submitted_by, key_of(submitted_by, once or uuid4().hex)
    )


@lasting
def _submitted(
    store: Store,
    config: dict[str, Any],
    launch: dict[str, Any],
    submitted_by: str | None,
    once: str,
) -> Job:
    with store.session() as session:
        job = session.scalar(select(Job).where(Job.once == once))
        if job is None:
            job = Job(
                key=key_of("submitted", once), once=once, state=QUEUED, config=config, facts={},
                launch=launch, submitted_by=submitted_by, attempts=0,
            )  # fmt: skip
            session.add(job)
        session.flush()
        return job


@lasting
def cancel_job(store: Store, job_id: int) -> Job:
    """A queued or running job is not to go on; its driver notices.

    Raises:
        NotFoundError: no such job.
        ConflictError: it has ended.
    """
    find_job(store, job_id)
    with store.session() as session:
        job = session.get_one(Job, job_id, with_for_update=True)
        if job.state not in OPEN:
            raise ConflictError(f"job {job.id} is {job.state}: there is nothing to cancel")
        if job.launch is None:
            raise ConflictError(
                f"job {job.id} runs in a shell: stop it there, with Ctrl-C; one whose shell is gone "
                "goes on where the same command is given again"
            )
        job.state, job.error = CANCELLED, None
        return job


@lasting
def resume_job(store: Store, job_id: int) -> Job:
    """A job that failed, was cancelled or lost its shell goes on from what is in the store.

    Raises:
        NotFoundError: no such job.
        ConflictError: it is done, or waits or runs for a server already.
    """
    find_job(store, job_id)
    with store.session() as session:
        job = session.get_one(Job, job_id, with_for_update=True)
        if job.state == DONE:
            raise ConflictError(f"job {job.id} is done: there is nothing to resume")
        if job.state in OPEN and job.launch is not None:
            raise ConflictError(f"job {job.id} is {job.state} already")
        job.state, job.error, job.attempts = QUEUED, None, 0
        job.launch = job.launch or {}
        return job


@lasting
def start_job(store: Store, job_id: int) -> Job | None:
    """A queued job runs now, one that runs goes on; None where it is not to run."""
    with store.session() as session:
        job = session.get(Job, job_id, with_for_update=True)
        if job is None or job.state not in OPEN:
            return None
        job.state = RUNNING
        return job


@lasting
def attempt(
    store: Store, kind: type[Job] | type[ExportOrder], number: int, most: int, by: int = 1
) -> bool:
    """Count a driver that is about to be started; or take that back, with -1.

    False where too many got nowhere, which fails what they should have done.
    """
    with store.session() as session:
        found: Any = session.get_one(kind, number, with_for_update=True)
        if found.state not in OPEN:
            return False
        if by > 0 and found.attempts >= most:
            found.state = FAILED
            found.error = (
                f"its driver died {most} times before it got anywhere; see the log, "
                "mend it, then resume"
            )
            return False
        found.attempts += by
        return True


@lasting
def open_jobs(store: Store) -> list[int]:
    """Submitted jobs that should be running, oldest first."""
    with store.reading() as session:
        query = select(Job.id).where(Job.state.in_(OPEN), Job.launch.is_not(None))
        return list(session.scalars(query.order_by(Job.id)))


@lasting
def page_of_jobs(
    store: Store,
    limit: int,
    before: int | None = None,
    state: str | None = None,
    model: str | None = None,
) -> list[tuple[Job, str]]:
    """Jobs with their models' names, newest number first; without their facts."""
    query = _jobs_with_models().order_by(Job.id.desc()).limit(limit)
    if before is not None:
        query = query.where(Job.id < before)
    if state is not None:
        query = query.where(Job.state == state)
    if model is not None:
        query = query.where(MODEL_NAME.icontains(model, autoescape=True))
    with store.reading() as session:
        return [(job, found) for job, found in session.execute(query)]


@lasting
def look_at_job(store: Store, number: int) -> tuple[Job, str]:
    """A job with its model's name; without its facts.

    Raises:
        NotFoundError: no such job.
    """
    query = _jobs_with_models().where(Job.id == number)
    with store.reading() as session:
        found = session.execute(query).one_or_none()
        if found is None:
            raise _no_job(number)
        job, name = found
        return job, name


def _no_job(number: int) -> NotFoundError:
    return NotFoundError(f"no job {number} in the store; `bitfront jobs` and the page list them")


def _jobs_with_models() -> Any:
    """Jobs with their models' names; without their facts, which may be large."""
    return (
        select(Job, MODEL_NAME)
        .join(Model, Model.weights_hash == Job.weights_hash, isouter=True)
        .options(defer(Job.facts, raiseload=True))
    )


@lasting
def job_stamp(store: Store, job_id: int) -> tuple[datetime, bool]:
    """When a job's record was changed, and whether it runs.

    Raises:
        NotFoundError: no such job.
    """
    with store.reading() as session:
        found = session.execute(
            select(Job.updated_at, Job.state, Job.weights_hash).where(Job.id == job_id)
        ).one_or_none()
        if found is None:
            raise _no_job(job_id)
        if found.weights_hash is None:
            find_job(store, job_id).model_hash  # noqa: B018  # says so
        return found.updated_at, found.state in OPEN


@lasting
def jobs_of_model(store: Store, model: str | None) -> list[tuple[int, datetime, bool]]:
    """Planned jobs of a model (by part of its name or its weights' hash; None: of all), newest first.

    Each with its number, when its record was changed, and whether it runs.
    """
    query = (
        select(Job.id, Job.updated_at, Job.state)
        .join(Model, Model.weights_hash == Job.weights_hash)
        .order_by(Job.id.desc())
    )
    if model is not None:
        asked = Job.config["model"].as_string() == model  # `demo`, or a path
        named = Model.name.icontains(model, autoescape=True)
        query = query.where(or_(named, Model.weights_hash == model, asked))
    with store.reading() as session:
        rows = session.execute(query)
        return [(row.id, row.updated_at, row.state in OPEN) for row in rows]


@lasting
def order_export(
    store: Store, job_id: int, point: int, targets: Sequence[str], submitted_by: str | None
) -> ExportOrder:
    """A new export that waits for a driver."""
    with store.session() as session:
        order = ExportOrder(
            job_id=job_id, point=point, targets=list(targets), state=QUEUED, files=[], result=[],
            submitted_by=submitted_by, attempts=0, created_at=now(),
        )  # fmt: skip
        session.add(order)
        session.flush()
        return order


@lasting
def find_export(store: Store, number: int) -> ExportOrder:
    """An export by number.

    Raises:
        NotFoundError: no such export.
    """
    with store.reading() as session:
        found = session.get(ExportOrder, number)
        if found is None:
            raise NotFoundError(f"no export {number} in the store")
        return found


@lasting
def exports_of(store: Store, job_id: int) -> list[ExportOrder]:
    """A job's exports, newest first."""
    with store.reading() as session:
        query = select(ExportOrder).where(ExportOrder.job_id == job_id)
        return list(session.scalars(query.order_by(ExportOrder.id.desc())))


@lasting
def open_exports(store: Store) -> list[int]:
    """Exports that should be made, oldest first."""
    with store.reading() as session:
        query = select(ExportOrder.id).where(ExportOrder.state.in_(OPEN))
        return list(session.scalars(query.order_by(ExportOrder.id)))


@lasting
def update_export(store: Store, /, number: int, **columns: Any) -> None:
    """Set columns of an export."""
    with store.session() as session:
        order = session.get_one(ExportOrder, number)
        for name, value in columns.items():
            setattr(order, name, value)


@lasting
def count_points(store: Store, job_ids: Sequence[int]) -> dict[int, int]:
    """How many finalists each job has; without those that couldn't be measured."""
    query = (
        select(Candidate.job_id, func.count().label("points"))
        .where(Candidate.job_id.in_(job_ids), Candidate.finalist, Candidate.failure.is_(None))
        .group_by(Candidate.job_id)
    )
    with store.reading() as session:
        return {row.job_id: row.points for row in session.execute(query)}


@lasting
def count_rows(store: Store) -> tuple[dict[str, int], dict[str, int]]:
    """Jobs by state, and the rows of what is measured."""
    with store.reading() as session:
        states = select(Job.state, func.count().label("jobs")).group_by(Job.state)
        by_state = {row.state: row.jobs for row in session.execute(states)}
        tables = (Measurement, SensitivityShare, CellTime, MapTime, ExportOrder, Claim)
        rows = {
            table.__tablename__: session.scalar(select(func.count()).select_from(table)) or 0
            for table in tables
        }
        return by_state, rows
