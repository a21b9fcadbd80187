"""What people do with jobs, over a store: the one implementation behind the API and the command line.

Answers are documents (`documents.py`), the same ones that the API sends. `client.Client` has the same
methods over HTTP.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from bitfront.answering import (
    Answer,
    Limits,
    NothingFitsError,
    answer,
    best_answer,
    compare,
    footprint,
)
from bitfront.documents import (
    detail_document,
    event_document,
    front_document,
    job_document,
    point_document,
)
from bitfront.front_view import FrontView
from bitfront.fronts import Front
from bitfront.remembered import Fronts
from cost_models.memory import PHASES
from store.claims import JOB, holders
from store.database import Store
from store.errors import NotFoundError
from store.events import add_event, events_after
from store.queries import find_job, find_tables, model_name
from store.submissions import (
    cancel_job,
    count_points,
    jobs_of_model,
    look_at_job,
    page_of_jobs,
    resume_job,
    submit_job,
)
from store.tables import Job

if TYPE_CHECKING:
    from bitfront.config import JobConfig  # pydantic

Document = dict[str, Any]
JOBS_A_PAGE, LOG_PAGE = 50, 2000


class Desk(Protocol):
    """Where jobs are handed in and asked for: a store, or a server."""

    def submit(self, config: "JobConfig", launch: Document, once: str | None = None) -> Document:
        """A job for whoever serves the store."""

    def job(self, number: int | None) -> Document:
        """A job with its progress; the latest for None."""

    def jobs(self, limit: int = JOBS_A_PAGE) -> Document:
        """The newest jobs."""

    def cancel(self, number: int) -> Document:
        """It is not to go on."""

    def resume(self, number: int) -> Document:
        """It is to go on."""

    def front(self, number: int) -> Document:
        """Its measured points."""

    def log(self, number: int, after: int = 0) -> tuple[list[Document], int]:
        """What happened in a job after an event, and the number of the last one."""

    def solve(
        self,
        number: int,
        average_bits: Sequence[float] = (),
        weight_bytes: Sequence[int] = (),
        limits: Mapping[str, float] | None = None,
    ) -> Document:
        """Predicted maps for other budgets."""

    def query(self, limits: Limits, **where: Any) -> Document:
        """The best measured map under constraints."""

    def compare(self, a: tuple[int, int], b: tuple[int, int]) -> Document:
        """Two points (job, number) in pairs."""


class Service:
    """Over a store, which is open. `by` is the token's name of who asks, where a server knows it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.fronts = Fronts(store)

    def submit(
        self, config: "JobConfig", launch: Document, once: str | None = None, by: str | None = None
    ) -> Document:
        """See `Desk.submit`."""
        document = config.model_dump(mode="json")
        job = submit_job(self.store, document, launch, by, once)
        return self._documents([(job, config.model)])[0]

    def jobs(
        self,
        limit: int = JOBS_A_PAGE,
        before: int | None = None,
        state: str | None = None,
        model: str | None = None,
    ) -> Document:
        """A page of jobs, newest first; `next` is the `before` of the next one."""
        rows = page_of_jobs(self.store, limit, before, state, model)
        following = rows[-1][0].id if len(rows) == limit else None
        return {"jobs": self._documents(rows), "next": following}

    def job(self, number: int | None) -> Document:
        """See `Desk.job`."""
        if number is None:
            number = find_job(self.store, None).id
        found, name = look_at_job(self.store, number)
        return {**self._documents([(found, name)])[0], "config": found.config}

    def cancel(self, number: int, by: str | None = None) -> Document:
        """See `Desk.cancel`."""
        found = cancel_job(self.store, number)
        add_event(self.store, number, "state", state=found.state, error=None, by=by)
        return self._document(found)

    def resume(self, number: int, by: str | None = None) -> Document:
        """See `Desk.resume`."""
        found = resume_job(self.store, number)
        add_event(self.store, number, "state", state=found.state, error=None, by=by)
        return self._document(found)

    def front(self, number: int) -> FrontView:
        """See `Desk.front`; the last line of a notebook's cell draws it."""
        return front_document(self.fronts.get(number))

    def detail(self, number: int) -> Document:
        """Units, bits of every scheme, each point's map, predicted losses, and seconds."""
        return detail_document(self.fronts.get(number), find_tables(self.store, number))

    def precision_map(self, number: int, point: int) -> Document:
        """The neutral map of a point; raises `NotFoundError`."""
        from bitfront.exporting import precision_map

        front = self.fronts.get(number)
        if (wanted := front.point(point)) is None:
            raise NotFoundError(f"job {number} has no measured point {point}")
        return precision_map(front, wanted).model_dump(mode="json")

    def log(self, number: int, after: int = 0) -> tuple[list[Document], int]:
        """See `Desk.log`."""
        find_job(self.store, number)
        found = events_after(self.store, number, after, limit=LOG_PAGE)
        return [event_document(event) for event in found], found[-1].id if found else after

    def solve(
        self,
        number: int,
        average_bits: Sequence[float] = (),
        weight_bytes: Sequence[int] = (),
        limits: Mapping[str, float] | None = None,
    ) -> Document:
        """See `Desk.solve`."""
        from bitfront.resolving import solve_again

        job = find_job(self.store, number)
        return solve_again(self.store, job, average_bits, weight_bytes, dict(limits or {}))

    def query(
        self,
        limits: Limits,
        job: int | None = None,
        model: str | None = None,
        engine: str | None = None,
        device: str | None = None,
        batch: int | None = None,
        context: int | None = None,
    ) -> Document:
        """See `Desk.query`: of one job, of a model's, or of all that there are."""
        answers, reasons = [], []
        fronts = list(self._fronts(job, model, engine, device))
        for found in fronts:
            try:
                answers.append(answer(found, limits, batch, context))
            except NothingFitsError as error:
                reasons.append((found.job.id, str(error)))
        if not answers:
            raise NothingFitsError(_why_not(model, reasons))
        best, others = best_answer(answers, by_size=limits.get("kl") is not None)
        return {
            **_answer(best),
            "considered": sum(len(found.points) for found in fronts),
            "jobs": len(fronts),
            "others": [_answer(other) for other in others],
        }

    def compare(self, a: tuple[int, int], b: tuple[int, int]) -> Document:
        """See `Desk.compare`."""
        (first, one), (second, two) = ((self.fronts.get(job), point) for job, point in (a, b))
        found = compare(self.store, (first, one), (second, two))
        for name, front, number in (("a", first, one), ("b", second, two)):
            point = front.point(number)
            assert point is not None  # or it could not have been compared
            taken = footprint(front) if front.layout.cache else None
            found[name] |= point_document(front, point, taken)
        return found

    def _fronts(
        self, job: int | None, model: str | None, engine: str | None, device: str | None
    ) -> Iterator[Front]:
        if job is not None:
            yield self.fronts.get(job)
            return
        for number, changed, running in jobs_of_model(self.store, model):
            try:
                front = self.fronts.at(number, changed, is_running=running)
            except NotFoundError:  # its driver has only just found the model
                continue
            serving = front.job.config.get("serving") or {}
            asked = ((engine, serving.get("engine")), (device, serving.get("device")))
            if front.points and all(wanted in {None, own} for wanted, own in asked):
                yield front

    def _document(self, job: Job) -> Document:
        return self._documents([(job, model_name(self.store, job))])[0]

    def _documents(self, rows: Sequence[tuple[Job, str]]) -> list[Document]:
        keys = {job.id: f"{JOB}{job.id}" for job, _ in rows}
        alive = holders(self.store, list(keys.values()))
        points = count_points(self.store, list(keys))
        return [
            job_document(job, name, alive=keys[job.id] in alive, points=points.get(job.id, 0))
            for job, name in rows
        ]


def _why_not(model: str | None, reasons: Sequence[tuple[int, str]]) -> str:
    if not reasons:
        return f"nothing was measured of {model or 'any model'} yet; `bitfront jobs` lists what was"
    told = "; ".join(
        f"job {number}: {why}" if len(reasons) > 1 else why for number, why in reasons[:3]
    )
    return told + (f"; and {len(reasons) - 3} jobs more" if len(reasons) > 3 else "")


def _answer(found: Answer) -> Document:
    point = point_document(found.front, found.point, found.footprint)
    return {
        **found.to_json(),
        "point": point,
        "reference_perplexity": found.front.reference_perplexity,
        "engine": (found.front.job.config.get("serving") or {}).get("engine"),
        "request": _request(found),
    }


def _request(found: Answer) -> Document | None:
    """Seconds of a prompt and its answer, where both were asked for."""
    if len(found.seconds) < len(PHASES):
        return None
    load = found.front.job.facts["times"]["workload"]
    seconds = found.seconds["prefill"] + load["generated"] * found.seconds["decode"]
    return {"prompt": load["prompt"], "generated": load["generated"], "seconds": seconds}
