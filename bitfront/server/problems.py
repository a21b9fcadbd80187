"""Errors as RFC 9457 problem documents: what is wrong, and what to do next."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from bitfront.answering import NothingFitsError
from bitfront.config import ConfigError
from bitfront.resolving import NoTablesError
from quantization.errors import BitfrontError, WorkerError
from search.errors import SearchError
from store.errors import ConflictError, NotFoundError, StoreAwayError, StoreError, StoreLockedError

RETRY_AFTER_S = 2
MEDIA_TYPE = "application/problem+json"
KINDS: tuple[tuple[type[Exception], int, str], ...] = (
    (StoreAwayError, 503, "The database is away"),
    (NotFoundError, 404, "Not found"),
    (ConflictError, 409, "Not in this state"),
    (StoreLockedError, 503, "The database is busy"),
    (StoreError, 500, "The database refuses"),
    (NothingFitsError, 404, "Nothing fits"),
    (NoTablesError, 409, "Nothing to solve with"),
    (ConfigError, 422, "Not a job"),
    (WorkerError, 503, "No workers"),
    (BitfrontError, 422, "Can't be done"),
    (SearchError, 422, "Can't be solved"),
)
"""The first that an error is decides."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What is wrong, and what to do next."},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "loc": {"type": "array", "items": {"type": "string"}},
                    "msg": {"type": "string"},
                },
            },
        },
    },
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Problems that a route may answer with, for the OpenAPI document."""
    content = {MEDIA_TYPE: {"schema": SCHEMA}}
    return {status: {"description": "A problem", "content": content} for status in statuses}


def problem(
    status: int,
    title: str,
    detail: str,
    errors: Sequence[dict[str, Any]] = (),
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """A problem document."""
    body: dict[str, Any] = {
        "type": "about:blank", "title": title, "status": status, "detail": detail,
    }  # fmt: skip
    if errors:
        body["errors"] = jsonable_encoder(list(errors))
    return JSONResponse(body, status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Make an application answer all its errors so."""
    for kind, status, title in KINDS:
        app.add_exception_handler(kind, _handler(status, title))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


def _handler(status: int, title: str) -> Any:
    def handle(_: Request, error: Exception) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
        return problem(status, title, str(error), getattr(error, "problems", ()), headers)

    return handle


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors = [
        {"loc": [str(part) for part in found["loc"]], "msg": found["msg"]}
        for found in error.errors()
    ]
    said = "; ".join(f"{'.'.join(e['loc'])}: {e['msg']}" for e in errors)
    return problem(422, "Not what this route takes", f"{said}; see /docs", errors)


def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    titles = {401: "Who are you?", 403: "Not allowed", 404: "Not found", 405: "Not like that",
              413: "Too large"}  # fmt: skip
    detail = error.detail
    if error.status_code == 404 and detail == "Not Found":
        detail = "there is nothing at this address; the routes are listed at /docs"
    headers = dict(error.headers) if error.headers else None
    return problem(error.status_code, titles.get(error.status_code, "Problem"), detail, (), headers)


def _unexpected(_: Request, error: Exception) -> JSONResponse:
    return problem(
        500,
        "A bug of Bitfront",
        f"{type(error).__name__}; the server's log has the trace: please report it",
    )
