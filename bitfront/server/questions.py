"""Routes that ask what was measured: fronts, the best map under constraints, comparisons, new budgets."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from bitfront.answering import Answer, NothingFitsError, answer, best_answer, compare, footprint
from bitfront.exporting import precision_map
from bitfront.fronts import Front, layout_of
from bitfront.resolving import solve_again
from bitfront.server.context import MOST_ID, Context, Here, JobId, PointId
from bitfront.server.documents import detail_document, front_document, point_document
from bitfront.server.problems import responses
from bitfront.server.security import READ
from quantization.errors import BitfrontError
from store.errors import NotFoundError
from store.queries import find_job, find_tables
from store.submissions import jobs_of_model

router = APIRouter(
    tags=["fronts"], dependencies=[READ], responses=responses(401, 403, 404, 422, 503)
)

Bytes = Annotated[int | None, Query(ge=1, le=2**62)]
Number = Annotated[float | None, Query(gt=0, allow_inf_nan=False)]
Place = Annotated[str, Query(pattern=r"^\d{1,9}:\d{1,9}$", description="JOB:POINT")]


class Solve(BaseModel):
    """Budgets to solve for, one kind or both; and limits that hold for all of them."""

    model_config = ConfigDict(extra="forbid")

    average_bits: (
        list[Annotated[float, Field(gt=0, le=64)]] | Annotated[float, Field(gt=0, le=64)]
    ) = Field(default_factory=list, max_length=64)
    weight_bytes: (
        list[Annotated[int, Field(ge=1, le=2**62)]] | Annotated[int, Field(ge=1, le=2**62)]
    ) = Field(default_factory=list, max_length=64)
    decode_s: Annotated[float, Field(gt=0, le=1e6)] | None = None
    prefill_s: Annotated[float, Field(gt=0, le=1e6)] | None = None


@router.get("/jobs/{job}/front")
def front(context: Here, job: JobId) -> dict[str, Any]:
    """A job's measured points with intervals, costs and controls, and what they tell."""
    return front_document(context.fronts.get(job))


@router.get("/jobs/{job}/detail")
def detail(context: Here, job: JobId) -> dict[str, Any]:
    """Units, bits of every scheme, each point's map, predicted losses, and where time went."""
    return detail_document(context.fronts.get(job), find_tables(context.store, job))


@router.post("/jobs/{job}/solve", responses=responses(409))
def solve(context: Here, job: JobId, wanted: Solve) -> dict[str, Any]:
    """The best maps for other budgets by the job's tables: predicted, with no model loaded."""
    bits, nbytes = _listed(wanted.average_bits), _listed(wanted.weight_bytes)
    if not bits and not nbytes:
        raise BitfrontError("give a budget: average_bits or weight_bytes")
    limits = {"decode_s": wanted.decode_s, "prefill_s": wanted.prefill_s}
    found = find_job(context.store, job)
    return solve_again(
        context.store, found, bits, nbytes, {k: v for k, v in limits.items() if v is not None}
    )


@router.get("/jobs/{job}/points/{point}/map")
def the_map(context: Here, job: JobId, point: PointId) -> JSONResponse:
    """The precision map of a measured point, as a file."""
    found = context.fronts.get(job)
    if (wanted := found.point(point)) is None:
        raise NotFoundError(f"job {job} has no measured point {point}")
    name = f"precision_map-{job}-{point}.json"
    return JSONResponse(
        precision_map(found, wanted).model_dump(mode="json"),
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


@router.get("/query")
def query(
    context: Here,
    model: Annotated[str | None, Query(max_length=500, pattern=r"^[^\x00]*$")] = None,
    job: Annotated[int | None, Query(ge=1, le=MOST_ID)] = None,
    engine: Annotated[str | None, Query(max_length=80)] = None,
    device: Annotated[str | None, Query(max_length=80)] = None,
    weight_bytes: Bytes = None,
    memory_bytes: Bytes = None,
    average_bits: Number = None,
    kl: Number = None,
    decode_s: Number = None,
    prefill_s: Number = None,
    batch: Annotated[int | None, Query(ge=1, le=2**20)] = None,
    length: Annotated[int | None, Query(alias="context", ge=1, le=2**30)] = None,
) -> dict[str, Any]:
    """The best measured map under constraints: of one job, of a model, or of all there are.

    Least KL within the limits, or with a limit on the KL the fewest bytes. KL is comparable on the
    same held-out text only: the text that most jobs used counts, and `others` has the best on each
    other one.
    """
    limits: dict[str, float | None] = {
        "weight_bytes": weight_bytes, "memory_bytes": memory_bytes, "average_bits": average_bits,
        "kl": kl, "decode_s": decode_s, "prefill_s": prefill_s,
    }  # fmt: skip
    answers, reasons = [], []
    fronts = _fronts(context, model, job, engine, device)
    for found in fronts:
        try:
            answers.append(answer(found, limits, batch, length))
        except NothingFitsError as error:
            reasons.append((found.job.id, str(error)))
    if not answers:
        raise NothingFitsError(_why_not(model, reasons))
    best, others = best_answer(answers, by_size=kl is not None)
    return {
        **_answer(best),
        "considered": sum(len(found.points) for found in fronts),
        "jobs": len(fronts),
        "others": [_answer(other) for other in others],
    }


@router.get("/compare")
def compare_two(context: Here, a: Place, b: Place) -> dict[str, Any]:
    """Two measured points in pairs, chunk by chunk, and the units that differ."""
    (first, one), (second, two) = (_place(context, place) for place in (a, b))
    found = compare(context.store, (first, one), (second, two))
    for name, chosen, number in (("a", first, one), ("b", second, two)):
        point = chosen.point(number)
        assert point is not None
        found[name] |= point_document(chosen, point, _taken(chosen))
    return found


def _fronts(
    context: Context, model: str | None, job: int | None, engine: str | None, device: str | None
) -> list[Front]:
    if job is not None:
        return [context.fronts.get(job)]
    found = [
        context.fronts.at(number, changed, is_running=running)
        for number, changed, running in jobs_of_model(context.store, model)
    ]
    return [
        front
        for front in found
        if front.points
        and engine in (None, (front.job.config.get("serving") or {}).get("engine"))
        and device in (None, (front.job.config.get("serving") or {}).get("device"))
    ]


def _why_not(model: str | None, reasons: list[tuple[int, str]]) -> str:
    if not reasons:
        return (
            f"nothing was measured of {model or 'any model'} yet; GET /api/v1/models lists what was"
        )
    told = "; ".join(f"job {number}: {why}" for number, why in reasons[:3])
    return told + (f"; and {len(reasons) - 3} jobs more" if len(reasons) > 3 else "")


def _answer(found: Answer) -> dict[str, Any]:
    point = point_document(found.front, found.point, found.footprint)
    return {**found.to_json(), "point": point}


def _taken(front: Front) -> Any:
    return footprint(front) if layout_of(front.job, front.model).cache else None


def _place(context: Context, place: str) -> tuple[Front, int]:
    job, _, point = place.partition(":")
    return context.fronts.get(int(job)), int(point)


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]
