"""Health, readiness, and metrics for Prometheus."""

import time
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Receive, Scope, Send

from bitfront.server.context import Context, Here
from bitfront.server.problems import responses
from bitfront.server.security import READ
from store.claims import JOB, held
from store.database import HEAD
from store.errors import StoreAwayError
from store.submissions import STATES, count_rows

router = APIRouter(tags=["health"])
PREFIX = "/api/v1"
COUNTED_EVERY_S = 10.0
BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """Of one application: requests as they come, the store's rows when somebody asks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "bitfront_request_seconds", "Of requests.", ("method", "route"),
            registry=self.registry, buckets=BUCKETS,
        )  # fmt: skip
        self.requests = Counter(
            "bitfront_requests", "Answered.", ("method", "route", "status"), registry=self.registry
        )
        self.jobs = Gauge("bitfront_jobs", "By state.", ("state",), registry=self.registry)
        self.alive = Gauge("bitfront_drivers", "That live.", registry=self.registry)
        self.rows = Gauge("bitfront_rows", "Of the store.", ("table",), registry=self.registry)
        self._counted_at = 0.0

    def count(self, context: Context) -> None:
        """Count rows, but not for every scrape: that reads whole tables."""
        if time.monotonic() - self._counted_at < COUNTED_EVERY_S:
            return
        states, rows = count_rows(context.store)
        for state in STATES:
            self.jobs.labels(state).set(states.get(state, 0))
        for table, count in rows.items():
            self.rows.labels(table).set(count)
        self.alive.set(len(held(context.store, JOB)))
        self._counted_at = time.monotonic()


class Clock:
    """Middleware that times requests, by route and not by address."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            route = _route(scope)
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.requests.labels(method, route, status).inc()
            if not route.endswith("/events"):
                self._metrics.seconds.labels(method, route).observe(time.perf_counter() - start)


def _route(scope: Scope) -> str:
    """A request's route as it was declared; addresses would be labels without end."""
    declared = getattr(scope.get("route"), "path", None)
    if declared is None:
        return "other"
    within = scope["path"].startswith(PREFIX) and not declared.startswith(PREFIX)
    return f"{PREFIX}{declared}" if within else str(declared)


METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}


def install(app: FastAPI) -> None:
    """Give an application its metrics."""
    metrics = Metrics()
    app.state.metrics = metrics
    app.add_middleware(Clock, metrics=metrics)


@router.get("/health")
def health() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready", responses=responses(503))
def ready(context: Here) -> dict[str, str]:
    """So does the database."""
    found = context.store.version()
    if found != HEAD:
        raise StoreAwayError(
            f"the store has schema {found or 'empty'}, and this server needs {HEAD}"
        )
    return {"status": "ready"}


@router.get(
    "/metrics", dependencies=[READ], responses=responses(401, 403, 503), response_class=Response
)
def metrics(request: Request, context: Here) -> Response:
    """Jobs by state, rows, drivers, and the requests of this process, as Prometheus reads them."""
    found: Metrics = request.app.state.metrics
    found.count(context)
    return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)
