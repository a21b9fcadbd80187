"""Errors as RFC 9457 problem documents: what is wrong, and what to do next."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitfront.answering import NothingFitsError
from bitfront.config import MOST_PROBLEMS, ConfigError
from bitfront.resolving import NoTablesError
from bitfront.server.settings import MOST_BODY_BYTES
from quantization.errors import BitfrontError, WorkerError
from quantization.registry import shown
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

TITLES = {
    400: "Can't be read", 401: "Who are you?", 403: "Not allowed", 404: "Not found",
    405: "Not like that", 413: "Too large", 416: "Not in this file",
    429: "Too many",
}  # fmt: skip
WORDS = {
    400: "the request can't be read: look at its headers, such as Range",
    413: f"the body has more than {MOST_BODY_BYTES:,} bytes; texts and models are named, not sent",
    416: "the file has no such range; leave out the header Range",
}
"""What to say for libraries that answer by themselves."""

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
    app.add_middleware(_Worded)


def _handler(status: int, title: str) -> Any:
    def handle(_: Request, error: Exception) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
        return problem(status, title, str(error), getattr(error, "problems", ()), headers)

    return handle


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors = [
        {"loc": [shown(part) for part in found["loc"]], "msg": found["msg"]}
        for found in error.errors()[:MOST_PROBLEMS]
    ]
    said = "; ".join(f"{'.'.join(e['loc'])}: {e['msg']}" for e in errors)
    return problem(422, "Not what this route takes", f"{said}; see /docs", errors)


def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if error.status_code == 404 and detail == "Not Found":
        detail = "there is nothing at this address; the routes are listed at /docs"
    headers = dict(error.headers) if error.headers else None
    return problem(error.status_code, TITLES.get(error.status_code, "Problem"), detail, (), headers)


def _unexpected(_: Request, error: Exception) -> JSONResponse:
    return problem(
        500,
        "A bug of Bitfront",
        f"{type(error).__name__}; the server's log has the trace: please report it",
    )


class _Worded:
    """Middleware: errors that a library answers by itself, in text, become problem documents too.

    These are bodies that are too large and ranges that no file has.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        replaced = False

        async def sent(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                replaced = message["status"] in WORDS and headers.get("content-type") != MEDIA_TYPE
                if replaced:
                    for name in ("content-length", "content-type"):
                        del headers[name]
                    status = message["status"]
                    found = problem(status, TITLES[status], WORDS[status], (), dict(headers))
                    await found(scope, receive, send)
            if not replaced:
                await send(message)

        await self._app(scope, receive, sent)
