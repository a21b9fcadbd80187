"""A service in process, what it answers, and what may be wrong with an answer: for `fuzz.py`."""

import asyncio
import json
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import hostile
from filling import Size, fill

from bitfront.config import config_of
from bitfront.server.app import create_app
from bitfront.server.settings import Settings
from store.database import Store
from store.queries import list_models, open_job
from store.submissions import cancel_job, order_export, submit_job, update_export
from store.tokens import create_token

PROBLEM = "application/problem+json"
EVENTS = "text/event-stream"
LONGEST_LINE = 8000


@dataclass(frozen=True)
class Answer:
    """What came back; `error` is what the application raised, if it did."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: str | None = None


class Target:
    """A service in process, on a store with jobs in every state.

    Args:
        store: empty.
        folder: for exports and baits.
        auth: whether it needs a token.
    """

    def __init__(self, store: Store, folder: Path, *, auth: bool) -> None:
        self.store, self.folder = store, folder
        fill(store, Size(models=1, jobs=2, measurements=0, layers=2))
        planned = {"model": "org/model-0", "serving": {}}
        open_job(
            store, "unplanned", list_models(store)[0][1], planned
        )  # between its model and its facts
        for state in ("queued", "cancelled"):
            job = submit_job(store, config_of("demo", {}).model_dump(mode="json"), {})
            if state == "cancelled":
                cancel_job(store, job.id)
        for state in ("done", "queued"):
            order = order_export(store, 1, 1, ["map"], None)
            files = [{"name": "map/precision_map.json", "bytes": 3, "sha256": ""}]
            update_export(store, order.id, state=state, files=files)
        (folder / "exports/1/map").mkdir(parents=True)
        (folder / "exports/1/map/precision_map.json").write_text("{}\n")
        (folder / "exports/secret").write_text("another's")
        hostile.make_baits(folder / "baits")
        roots = ((folder / "baits/root").resolve(),)
        self.app = create_app(Settings(store.url, folder, roots=roots, auth=auth), store)
        self.tokens = [
            create_token(store, f"fuzz-{role}", role) for role in ("admin", "submit", "read")
        ]
        self._runner = asyncio.Runner()

    def close(self) -> None:
        """Let the loop and the database go."""
        self._runner.close()
        self.store.engine.dispose()

    def ask(self, method: str, target: str, headers: dict[str, str], body: bytes = b"") -> Answer:
        """A request as a server would pass it on, with an address that is encoded already."""
        return self._runner.run(_ask(self.app, method, target, headers, body))

    @property
    def bearer(self) -> dict[str, str]:
        """The headers of one who may do everything."""
        return {"authorization": f"Bearer {self.tokens[0]}"}


async def _ask(app: Any, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
    path, _, query = target.partition("?")
    if not any(name.lower() == "host" for name in headers):
        headers = {"Host": "127.0.0.1", **headers}
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": method, "scheme": "http", "path": unquote(path), "query_string": query.encode(),
        "raw_path": path.encode(), "root_path": "", "client": ("127.0.0.1", 1), "server": ("x", 80),
        "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in headers.items()],
    }  # fmt: skip
    left = [body]
    gone = asyncio.Event()
    start: dict[str, Any] = {}
    chunks: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        elif message["type"] == "http.response.body":
            chunks.append(message.get("body", b""))
            if EVENTS in _headers(start).get("content-type", ""):
                gone.set()  # that of a job that waits has no end

    error = None
    try:
        async with asyncio.timeout(30):
            await app(scope, receive, send)
    except Exception:  # whatever the application lets out is what we look for
        error = traceback.format_exc()
    return Answer(start.get("status", 500), _headers(start), b"".join(chunks), error)


def _headers(start: dict[str, Any]) -> dict[str, str]:
    return {k.decode("latin-1"): v.decode("latin-1") for k, v in start.get("headers", [])}


def faults(answer: Answer, documented: set[str] | None = None) -> list[str]:
    """What is wrong with an answer, whatever was asked."""
    found = []
    if answer.error:
        found.append(f"raised: {answer.error[-1500:]}")
    if answer.status >= 500:
        found.append(f"status {answer.status}: {answer.body[:300]!r}")
    if documented is not None and str(answer.status) not in documented:
        found.append(f"status {answer.status} is not documented: {answer.body[:300]!r}")
    if b"Traceback (most recent call last)" in answer.body:
        found.append("a traceback in the body")
    kind = answer.headers.get("content-type", "")
    if "json" in kind:
        found += _json_faults(answer, kind)
    elif answer.status >= 400:
        found.append(f"status {answer.status} as '{kind}': {answer.body[:100]!r}")
    return found


def _json_faults(answer: Answer, kind: str) -> list[str]:
    if answer.status == 206 or (not answer.body and answer.status in {204, *range(400, 500)}):
        return []  # a part, nothing to say, or an answer to HEAD
    try:
        document = json.loads(answer.body, parse_constant=_no_constant)
    except ValueError as error:
        return [f"not JSON ({error}): {answer.body[:100]!r}"]
    if answer.status < 400:
        return []
    types = {"type": str, "title": str, "status": int, "detail": str}
    wrong = [name for name, of in types.items() if not isinstance(document.get(name), of)]
    found = [f"no problem document, lacks {wrong}: {answer.body[:200]!r}"] if wrong else []
    if kind != PROBLEM:
        found.append(f"an error as '{kind}'")
    if document.get("status") != answer.status:
        found.append(f"status {answer.status}, and {document.get('status')} in the body")
    if len(answer.body) > 20 * LONGEST_LINE:
        found.append(f"an error of {len(answer.body)} bytes")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
