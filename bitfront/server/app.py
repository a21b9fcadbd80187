"""The application: routes, page, errors, metrics, and the supervisor beside them."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitfront.server import catalogue, exports, health, jobs, problems, questions, tokens
from bitfront.server.context import Context
from bitfront.server.schema import with_job
from bitfront.server.settings import LOOPBACK, MOST_BODY_BYTES, Settings
from bitfront.server.supervising import Supervisor
from store.database import Store

PREFIX = "/api/v1"
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:"
DESCRIPTION = "Hardware-aware bit-allocation search: measured Pareto fronts of precision maps."


def create_app(settings: Settings, store: Store, supervisor: Supervisor | None = None) -> FastAPI:
    """The whole service as an ASGI application.

    Args:
        settings: of this server.
        store: opened; asks a database that is away once, so that requests don't queue up.
        supervisor: runs as long as the application does.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if supervisor:
            supervisor.start()
        yield
        if supervisor:
            supervisor.stop()

    app = FastAPIOffline(
        title="Bitfront",
        version=settings.version,
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.context = Context(settings, store)
    # inside of what words its errors, which FastAPI's own limit isn't
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MOST_BODY_BYTES)
    problems.install(app)
    health.install(app)
    if not settings.auth:
        app.add_middleware(_Neighbours)
    app.add_middleware(_Headers)
    api = APIRouter(prefix=PREFIX)
    for module in (jobs, questions, exports, catalogue, tokens):
        api.include_router(module.router)
    api.include_router(jobs.schema_router)
    app.include_router(api)
    app.include_router(health.router)
    _page(app)
    app.openapi = partial(_openapi, app, app.openapi)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI, generated: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = with_job(generated())
    return app.openapi_schema


class _Neighbours:
    """Middleware of a server that asks for no token: only this machine's own pages may use it.

    Bound to loopback, it is still reached by every page that a browser here shows: by another site's
    forms (whose `Origin` tells), or under a name of that site's which leads to loopback.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if _name(host) not in LOOPBACK or origin not in {
                None,
                f"http://{host}",
                f"https://{host}",
            }:
                refusal = problems.problem(
                    403,
                    "Not allowed",
                    "a server without tokens answers this machine's own pages and programs only, at "
                    "127.0.0.1 or localhost; start it with --auth on",
                )
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name(host: str) -> str | None:
    """Of a `Host`, without its port; None where it can't be read."""
    try:
        return urlsplit(f"//{host}").hostname if host.isascii() else None
    except ValueError:  # brackets that hold no address
        return None


class _Headers:
    """Middleware: what browsers are told of every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                if not scope["path"].startswith("/docs"):  # Swagger's page has a script in it
                    headers["Content-Security-Policy"] = POLICY
            await send(message)

        await self._app(scope, receive, sent)


def _page(app: FastAPI) -> None:
    """The page, which holds no data: it asks for a token where one is needed."""
    folder = Path(str(files("bitfront"))) / "web"
    plotly = Path(str(files("plotly"))) / "package_data" / "plotly.min.js"

    @app.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return FileResponse(folder / "index.html")

    @app.get("/web/plotly.min.js", include_in_schema=False)
    def script() -> FileResponse:
        return FileResponse(plotly, headers={"Cache-Control": "max-age=86400"})

    app.mount("/web", StaticFiles(directory=folder), name="web")
