"""What may go: nothing that a front, an export, or a job that isn't over refers to."""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, delete, exists, func, select
from sqlalchemy.orm import Session

from store.claims import clock
from store.database import Store
from store.queries import reference_hash
from store.submissions import CANCELLED, FAILED, OPEN
from store.tables import (
    Candidate,
    Claim,
    Event,
    ExportOrder,
    Job,
    Measurement,
    SensitivityShare,
    SolverTables,
)


@dataclass(frozen=True)
class Pruned:
    """Rows that went, or would go."""

    jobs: int
    measurements: int
    sensitivity_shares: int
    events: int
    claims: int

    def to_json(self) -> dict[str, int]:
        """By table."""
        return asdict(self)


def prune(store: Store, before: datetime, *, really: bool) -> Pruned:
    """Remove what is older and nobody refers to; in one transaction.

    - jobs that failed or were cancelled before, without a measured finalist or an export;
    - measurements from before, of maps that are candidates of no job that is left (those of an
      audit or a refinement, mostly) and of no unquantized model that a job is left of;
    - shares of sensitivity tables of models that no job is left of;
    - events of jobs that ended before, and claims that have run out.

    Args:
        store: opened.
        before: a time with a zone.
        really: or only count.
    """
    with store.session() as session:
        gone = _unwanted_jobs(session, before)
        counts = {"jobs": len(gone)}
        ours = Event.job_id.in_(select(Job.id).where(Job.state.not_in(OPEN)))
        counts["events"] = _delete(session, Event, Event.at < before, ours)
        for table in (Event, Candidate, SolverTables):
            session.execute(delete(table).where(table.job_id.in_(gone)))
        session.execute(delete(Job).where(Job.id.in_(gone)))
        session.flush()
        jobs = session.execute(select(Job.weights_hash, Job.state).distinct()).all()
        shown = [reference_hash(row.weights_hash) for row in jobs if row.weights_hash]
        at_work = [row.weights_hash for row in jobs if row.weights_hash and row.state in OPEN]
        counts["measurements"] = _delete(
            session,
            Measurement,
            Measurement.measured_at < before,
            Measurement.map_hash.not_in(shown),  # of unquantized models, which fronts show
            Measurement.weights_hash.not_in(at_work),  # refined and audited maps aren't candidates
            ~_is_candidate(),
        )
        counts["sensitivity_shares"] = _delete_shares(session)
        counts["claims"] = _delete(session, Claim, Claim.expires_at < clock(session))
        if not really:
            session.rollback()
    return Pruned(**counts)


def _unwanted_jobs(session: Session, before: datetime) -> list[int]:
    """Jobs that came to nothing before."""
    finalists = exists().where(Candidate.job_id == Job.id, Candidate.finalist)
    exports = exists().where(ExportOrder.job_id == Job.id)
    query: Select[Any] = select(Job.id).where(
        Job.state.in_((FAILED, CANCELLED)), Job.updated_at < before, ~finalists, ~exports
    )
    return list(session.scalars(query))


def _is_candidate() -> Any:
    """Whether a measurement's map is a candidate of a job of the same model."""
    return exists().where(
        Candidate.map_hash == Measurement.map_hash,
        Candidate.job_id == Job.id,
        Job.weights_hash == Measurement.weights_hash,
    )


def _delete(session: Session, table: Any, *conditions: Any) -> int:
    count = session.scalar(select(func.count()).select_from(table).where(*conditions)) or 0
    session.execute(delete(table).where(*conditions))
    return count


def _delete_shares(session: Session) -> int:
    """Shares of models that no job is left of; the model is in their provenance."""
    known = set(session.scalars(select(Job.weights_hash).distinct()))
    keys = [
        key
        for key, provenance in session.execute(
            select(SensitivityShare.key, SensitivityShare.provenance)
        )
        if provenance.get("weights_hash") not in known
    ]
    for start in range(0, len(keys), 500):
        part = keys[start : start + 500]
        session.execute(delete(SensitivityShare).where(SensitivityShare.key.in_(part)))
    return len(keys)
