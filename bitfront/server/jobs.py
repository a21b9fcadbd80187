"""Routes of jobs: submit, list, watch, cancel, resume."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException

from bitfront.documents import event_document, log_line
from bitfront.server.context import MOST_ID, Here, JobId
from bitfront.server.policy import check_again, job_of
from bitfront.server.problems import RETRY_AFTER_S, responses
from bitfront.server.schema import COMPONENTS, JOB, job_schema
from bitfront.server.security import READ, Submitter, still_known
from store.events import events_after, latest_event
from store.queries import find_job
from store.submissions import OPEN, look_at_job
from store.tables import Job

router = APIRouter(
    prefix="/jobs", tags=["jobs"], dependencies=[READ], responses=responses(401, 403, 404, 422, 503)
)
WATCH_S = 0.7
QUIET_S = 15.0
CHECK_S = 10.0
"""How often a stream looks whether its token is still good."""
LAST_LOOKS = 3
MOST_STREAMS = 256
"""Open at the same time: each looks at the database every `WATCH_S`."""
LOG_PAGE = 2000

JobBody = Annotated[
    dict[str, Any], Body(json_schema_extra={"$ref": f"{COMPONENTS}{JOB}"}, openapi_examples={
        "demo": {"summary": "The demo model, by default", "value": {"model": "demo"}},
        "budgets": {
            "summary": "Two budgets in average bits",
            "value": {"model": "demo", "menu": "int-sym-g64", "budgets": [3.5, 4.25]},
        },
    }),
]  # fmt: skip


@router.post("", status_code=201, responses=responses(400, 413))
def submit(
    context: Here,
    who: Submitter,
    body: JobBody,
    response: Response,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
) -> dict[str, Any]:
    """Submit a job: the fields of a job's YAML, of which only `model` is needed (`GET /schema`).

    With an `Idempotency-Key`, a request that is repeated is the same job.
    """
    config, launch = job_of(body, context.settings.roots)
    found = context.service.submit(config, launch, idempotency_key, who.name)
    response.headers["Location"] = f"/api/v1/jobs/{found['id']}"
    return found


@router.get("")
def list_all(
    context: Here,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[int | None, Query(ge=1, le=MOST_ID)] = None,
    state: Literal["queued", "running", "done", "failed", "cancelled"] | None = None,
    model: Annotated[str | None, Query(max_length=200, pattern=r"^[^\x00]*$")] = None,
) -> dict[str, Any]:
    """Jobs, newest first, a page at a time: `next` is the `before` of the next one."""
    return context.service.jobs(limit, before, state, model)


@router.get("/{job}")
def show(context: Here, job: JobId) -> dict[str, Any]:
    """A job: its state, its progress with the time left, and its configuration."""
    return context.service.job(job)


@router.post("/{job}/cancel", responses=responses(409))
def cancel(context: Here, who: Submitter, job: JobId) -> dict[str, Any]:
    """Stop a job; what was measured stays, and it can be resumed."""
    return context.service.cancel(job, who.name)


@router.post("/{job}/resume", responses=responses(409))
def resume(context: Here, who: Submitter, job: JobId) -> dict[str, Any]:
    """Go on with a job that failed, was cancelled, or lost the shell that it ran in."""
    found = find_job(context.store, job)
    check_again(found.config, context.settings.roots)
    return context.service.resume(job, who.name)


@router.get("/{job}/logs", response_class=PlainTextResponse)
def logs(
    context: Here,
    job: JobId,
    after: Annotated[int, Query(ge=0, le=MOST_ID, description="The number of an event.")] = 0,
) -> PlainTextResponse:
    """A job's log as text; the header `X-Next` is the `after` of what comes later."""
    find_job(context.store, job)
    found = events_after(context.store, job, after, ("log", "stage", "state"), LOG_PAGE)
    following = str(found[-1].id if found else after)
    text = "".join(f"{log_line(event_document(event))}\n" for event in found)
    return PlainTextResponse(text, headers={"X-Next": following})


@router.get("/{job}/history")
def history(
    context: Here,
    job: JobId,
    after: Annotated[int, Query(ge=0, le=MOST_ID, description="The number of an event.")] = 0,
) -> dict[str, Any]:
    """What happened in a job, a page at a time: `next` is the `after` of what comes later."""
    events, following = context.service.log(job, after)
    return {"events": events, "next": following}


def _known(context: Here, job: JobId) -> Job:
    """A job that is there: once a stream has begun, it is too late to say that it isn't."""
    return find_job(context.store, job)


async def _place(context: Here, job: JobId) -> AsyncIterator[None]:
    """One of the streams that there may be, as long as a request goes on."""
    if context.streams >= MOST_STREAMS:
        raise HTTPException(
            429,
            f"{MOST_STREAMS} streams of events are open, the most that this server keeps; "
            f"ask `GET /api/v1/jobs/{job}` from time to time instead, or try again later",
            {"Retry-After": str(RETRY_AFTER_S)},
        )
    context.streams += 1
    try:
        yield
    finally:
        context.streams -= 1


@router.get(
    "/{job}/events",
    response_class=EventSourceResponse,
    dependencies=[Depends(_place)],
    responses=responses(429),
)
async def events(
    request: Request,
    context: Here,
    found: Annotated[Job, Depends(_known)],
    last_event_id: Annotated[str | None, Header(pattern=r"^[0-9]{1,9}$")] = None,
) -> AsyncIterator[ServerSentEvent]:
    """What happens in a job, as it happens; `Last-Event-ID` goes on where a stream broke off.

    Without it the stream begins with the job's state and what follows. It ends with the job, or when
    its token is revoked.
    """
    store, job = context.store, found.id
    after = int(last_event_id) if last_event_id else await run_in_threadpool(
        latest_event, store, job
    )  # fmt: skip
    yield ServerSentEvent(event="state", data={"state": found.state, "error": found.error})
    told: Any = None
    quiet, over, checked = 0.0, 0, time.monotonic()
    while not await request.is_disconnected():
        found, _ = await run_in_threadpool(look_at_job, store, job)
        news = await run_in_threadpool(events_after, store, job, after)
        for event in news:
            after = event.id
            data = event_document(event)
            yield ServerSentEvent(event=event.kind, id=str(event.id), data=data)
        if found.progress != told:
            told = found.progress
            yield ServerSentEvent(event="progress", data=told)
        elif not news:
            quiet += WATCH_S
        over = 0 if found.state in OPEN or news else over + 1
        if over > LAST_LOOKS:  # a job that is done has its findings told after that
            return
        if quiet >= QUIET_S:  # or a proxy takes the stream for dead
            quiet = 0.0
            yield ServerSentEvent(comment="still here")
        if time.monotonic() - checked >= CHECK_S:
            checked = time.monotonic()
            if not await run_in_threadpool(still_known, context, request):
                return
        await asyncio.sleep(WATCH_S)


schema_router = APIRouter(tags=["jobs"], dependencies=[READ])


@schema_router.get("/schema", responses=responses(401, 403))
def schema() -> dict[str, Any]:
    """The JSON Schema of a job's configuration, with defaults."""
    return job_schema()
