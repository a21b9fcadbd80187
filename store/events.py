"""What happened in a job: for those who watch it, and for its log."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select, update

from store.database import Store, lasting
from store.tables import Event, Job, now

LONGEST_TEXT = 4000


@lasting
def add_event(store: Store, /, job_id: int, kind: str, **data: Any) -> None:
    """Append to a job's events."""
    with store.session() as session:
        session.add(Event(job_id=job_id, kind=kind, data=data))


def log(store: Store, job_id: int, text: str, level: str = "info") -> None:
    """A line of the job's log."""
    text = (
        text if len(text) <= LONGEST_TEXT else f"… {text[-LONGEST_TEXT:]}"
    )  # traces end in the error
    add_event(store, job_id, "log", level=level, text=text)


@lasting
def events_after(
    store: Store,
    job_id: int,
    after: int = 0,
    kinds: Sequence[str] = (),
    limit: int = 500,
) -> list[Event]:
    """A job's events with a greater number, in their order."""
    with store.reading() as session:
        query = select(Event).where(Event.job_id == job_id, Event.id > after)
        if kinds:
            query = query.where(Event.kind.in_(kinds))
        return list(session.scalars(query.order_by(Event.id).limit(limit)))


@lasting
def latest_event(store: Store, job_id: int) -> int:
    """The number of a job's newest event; 0 without one."""
    with store.reading() as session:
        return session.scalar(select(func.max(Event.id)).where(Event.job_id == job_id)) or 0


@lasting
def save_progress(store: Store, job_id: int, progress: dict[str, Any]) -> None:
    """Where a job is; a driver that has done a step has started well."""
    good = {"attempts": 0} if progress["done"] else {}
    with store.session() as session:
        told = update(Job).where(Job.id == job_id)
        session.execute(told.values(progress=progress, updated_at=now(), **good))
