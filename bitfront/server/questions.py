"""Routes that ask what was measured: fronts, the best map under constraints, comparisons, new budgets."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from bitfront.answering import LIMITS
from bitfront.config import Bits, Joules, Seconds
from bitfront.config import Bytes as Size
from bitfront.server.context import MOST_ID, Here, JobId, PointId
from bitfront.server.problems import responses
from bitfront.server.security import READ
from quantization.errors import BitfrontError

router = APIRouter(
    tags=["fronts"], dependencies=[READ], responses=responses(401, 403, 404, 422, 503)
)

QUERY = {
    *LIMITS, "model", "job", "engine", "device", "batch", "context",
}  # fmt: skip
"""What `query` takes."""
MOST_BUDGETS = Field(max_length=8)
Bytes = Annotated[int | None, Query(ge=1, le=2**62)]
Number = Annotated[float | None, Query(gt=0, allow_inf_nan=False)]
Place = Annotated[str, Query(pattern=r"^[0-9]{1,9}:[0-9]{1,9}$", description="JOB:POINT")]


class Solve(BaseModel):
    """Budgets to solve for, one kind or both; and limits that hold for all of them."""

    model_config = ConfigDict(extra="forbid")

    average_bits: Annotated[list[Bits], MOST_BUDGETS] | Bits = Field(default_factory=list)
    weight_bytes: Annotated[list[Size], MOST_BUDGETS] | Size = Field(default_factory=list)
    decode_s: Seconds | None = None
    prefill_s: Seconds | None = None
    decode_j: Joules | None = None
    prefill_j: Joules | None = None


@router.get("/jobs/{job}/front")
def front(context: Here, job: JobId) -> dict[str, Any]:
    """A job's measured points with intervals, costs and controls, and what they tell."""
    return context.service.front(job)


@router.get("/jobs/{job}/detail")
def detail(context: Here, job: JobId) -> dict[str, Any]:
    """Units, bits of every scheme, each point's map, predicted losses, and where time went."""
    return context.service.detail(job)


@router.post("/jobs/{job}/solve", responses=responses(400, 409, 413))
def solve(context: Here, job: JobId, wanted: Solve) -> dict[str, Any]:
    """The best maps for other budgets by the job's tables: predicted, with no model loaded."""
    bits, nbytes = _listed(wanted.average_bits), _listed(wanted.weight_bytes)
    if not bits and not nbytes:
        raise BitfrontError("give a budget: average_bits or weight_bytes")
    limits = {
        "decode_s": wanted.decode_s, "prefill_s": wanted.prefill_s,
        "decode_j": wanted.decode_j, "prefill_j": wanted.prefill_j,
    }  # fmt: skip
    given = {k: v for k, v in limits.items() if v is not None}
    return context.service.solve(job, bits, nbytes, given)


@router.get("/jobs/{job}/points/{point}/map")
def the_map(context: Here, job: JobId, point: PointId) -> JSONResponse:
    """The precision map of a measured point, as a file."""
    name = f"precision_map-{job}-{point}.json"
    return JSONResponse(
        context.service.precision_map(job, point),
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


@router.get("/query")
def query(
    request: Request,
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
    decode_j: Number = None,
    prefill_j: Number = None,
    batch: Annotated[int | None, Query(ge=1, le=2**20)] = None,
    length: Annotated[int | None, Query(alias="context", ge=1, le=2**30)] = None,
) -> dict[str, Any]:
    """The best measured map under constraints: of one job, of a model, or of all there are.

    Least KL within the limits, or with a limit on the KL the fewest bytes. KL is comparable on the
    same held-out text only: the text that most jobs used counts, and `others` has the best on each
    other one.
    """
    if unknown := set(request.query_params) - QUERY:
        raise BitfrontError(  # or the answer would break a limit that was misspelt
            f"no parameter {', '.join(sorted(unknown))}; there are {', '.join(sorted(QUERY))}"
        )
    limits: dict[str, float | None] = {
        "weight_bytes": weight_bytes, "memory_bytes": memory_bytes, "average_bits": average_bits,
        "kl": kl, "decode_s": decode_s, "prefill_s": prefill_s,
        "decode_j": decode_j, "prefill_j": prefill_j,
    }  # fmt: skip
    return context.service.query(limits, job, model, engine, device, batch, length)


@router.get("/compare")
def compare_two(context: Here, a: Place, b: Place) -> dict[str, Any]:
    """Two measured points in pairs, chunk by chunk, and the units that differ."""
    return context.service.compare(_place(a), _place(b))


def _place(text: str) -> tuple[int, int]:
    job, _, point = text.partition(":")
    return int(job), int(point)


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]
