"""A Bitfront server from Python.

    >>> from bitfront.client import Client
    >>> client = Client("http://127.0.0.1:8400")          # token: $BITFRONT_TOKEN
    >>> job = client.submit({"model": "demo", "budgets": [4.25]})
    >>> client.wait(job["id"])["state"]
    'done'
    >>> client.front(job["id"])                           # a notebook draws it

Methods give the API's documents (`/docs` of the server). A server that restarts, or whose database
does, is asked again for a while; only then is it an error.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from bitfront.config import JobConfig
from bitfront.front_view import FrontView
from quantization.errors import BitfrontError

TOKEN, SERVER = "BITFRONT_TOKEN", "BITFRONT_SERVER"
PATIENCE_S = 60.0
PAUSE_S = 1.0
ENDED = ("done", "failed", "cancelled")
Document = dict[str, Any]


class ServerSaysError(BitfrontError):
    """What a server answered, in its words; `status` is that of HTTP, 0 for none."""

    def __init__(self, text: str, status: int = 0, problem: Document | None = None) -> None:
        super().__init__(text)
        self.status, self.problem = status, problem or {}


class Client:
    """Of one server.

    Args:
        url: of the server; by default `$BITFRONT_SERVER`, or this machine's.
        token: by default `$BITFRONT_TOKEN`.
        patience_s: how long a server that is away is asked again.
        transport: of httpx, for tests.

    Raises:
        ServerSaysError: in all methods: the server can't be reached, or refuses, and why.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        patience_s: float = PATIENCE_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = (url or os.environ.get(SERVER) or "http://127.0.0.1:8400").rstrip("/")
        if "://" not in self.url:
            self.url = f"http://{self.url}"
        token = token or os.environ.get(TOKEN)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._patience_s = patience_s
        try:
            self._http = httpx.Client(
                base_url=f"{self.url}/api/v1", headers=headers, timeout=60.0, transport=transport
            )
        except (httpx.InvalidURL, ValueError, UnicodeEncodeError) as error:
            raise ServerSaysError(f"'{self.url}' is no address of a server ({error})") from error

    def submit(
        self,
        config: JobConfig | Mapping[str, Any],
        launch: Mapping[str, Any] | None = None,
        once: str | None = None,
    ) -> Document:
        """Submit a job.

        Args:
            config: fields of a job's YAML; all but `model` have defaults.
            launch: workers of the job, and what each needs of the cluster.
            once: a submission that is repeated with the same word is the same job.
        """
        given = config.model_dump(mode="json") if isinstance(config, JobConfig) else dict(config)
        body = {**given, **({"workers": dict(launch)} if launch else {})}
        headers = {"Idempotency-Key": once} if once else {}
        return self._json("POST", "/jobs", json=body, headers=headers, repeat=bool(once))

    def jobs(self, **where: Any) -> Document:
        """A page of jobs: `limit`, `before`, `state`, `model`."""
        return self._json("GET", "/jobs", params=where)

    def job(self, number: int | None = None) -> Document:
        """A job with its progress and configuration; the latest that changed for None."""
        if number is None:
            newest = self.jobs(limit=200)["jobs"]
            if not newest:
                raise ServerSaysError(f"no jobs at {self.url} yet; submit one")
            number = max(newest, key=lambda job: (str(job["updated_at"]), job["id"]))["id"]
        return self._json("GET", f"/jobs/{number}")

    def cancel(self, number: int) -> Document:
        """Stop a job; what was measured stays."""
        return self._json("POST", f"/jobs/{number}/cancel")

    def resume(self, number: int) -> Document:
        """Go on with a job."""
        return self._json("POST", f"/jobs/{number}/resume")

    def wait(self, number: int, every_s: float = 2.0) -> Document:
        """The job, once it has ended."""
        while (found := self.job(number))["state"] not in ENDED:
            time.sleep(every_s)
        return found

    def events(self, number: int, after: int | None = None) -> Iterator[Document]:
        """What happens in a job as it happens, until it ends; breaks are bridged.

        Args:
            number: of the job.
            after: the number of an event to go on after; 0 begins with the first one.
        """
        end, state = time.monotonic() + self._patience_s, None
        while True:
            try:
                for event in self._stream(number, after):
                    end = time.monotonic() + self._patience_s
                    after, state = event.get("id", after), event.get("state", state)
                    yield event
                if state in ENDED:  # else it was cut off, and asking again tells why
                    return
            except httpx.TransportError as error:
                if time.monotonic() > end:
                    raise self._away(error) from error
            except ServerSaysError as error:
                if error.status != 503 or time.monotonic() > end:
                    raise
            time.sleep(PAUSE_S)

    def log(self, number: int, after: int = 0) -> tuple[list[Document], int]:
        """All events after one, as far as they are there, and the number of the last."""
        found: list[Document] = []
        while True:
            page = self._json("GET", f"/jobs/{number}/history", params={"after": after})
            found += page["events"]
            if page["next"] == after:
                return found, after
            after = page["next"]

    def front(self, number: int) -> FrontView:
        """A job's measured points; the last line of a notebook's cell draws it."""
        return FrontView(self._json("GET", f"/jobs/{number}/front"))

    def detail(self, number: int) -> Document:
        """Units, bits of every scheme, each point's map, predicted losses, and seconds."""
        return self._json("GET", f"/jobs/{number}/detail")

    def solve(
        self,
        number: int,
        average_bits: Sequence[float] = (),
        weight_bytes: Sequence[int] = (),
        limits: Mapping[str, float] | None = None,
    ) -> Document:
        """Predicted maps for other budgets, by a job's tables."""
        body = {
            "average_bits": list(average_bits), "weight_bytes": list(weight_bytes),
            **(limits or {}),
        }  # fmt: skip
        return self._json("POST", f"/jobs/{number}/solve", json=body, repeat=True)

    def query(self, limits: Mapping[str, float | None], **where: Any) -> Document:
        """The best measured map within limits.

        Args:
            limits: upper bounds by name: `weight_bytes`, `average_bits`, `kl`, `memory_bytes`,
                `decode_s`, `prefill_s`, `decode_j`, `prefill_j`.
            where: `job`, `model`, `engine`, `device`; and the workload's `batch` and `context`.
        """
        given = {k: v for k, v in {**limits, **where}.items() if v is not None}
        return self._json("GET", "/query", params=given)

    def compare(self, a: tuple[int, int], b: tuple[int, int]) -> Document:
        """Two points (job, number) in pairs, chunk by chunk."""
        places = {name: f"{job}:{point}" for name, (job, point) in (("a", a), ("b", b))}
        return self._json("GET", "/compare", params=places)

    def precision_map(self, number: int, point: int) -> Document:
        """The neutral map of a point."""
        return self._json("GET", f"/jobs/{number}/points/{point}/map")

    def export(
        self, number: int, point: int, targets: Sequence[str], folder: Path, every_s: float = 1.0
    ) -> Document:
        """Have a point written for targets, and download it into a folder that is free.

        Raises:
            ServerSaysError: the export failed, and why.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ServerSaysError(f"'{folder}' is not an empty folder; choose another")
        order = self._json(
            "POST", f"/jobs/{number}/points/{point}/exports", json={"targets": list(targets)}
        )
        while order["state"] not in ENDED:
            time.sleep(every_s)
            order = self._json("GET", f"/exports/{order['id']}")
        if order["state"] != "done":
            raise ServerSaysError(f"the export failed: {order['error']}")
        for file in order["files"]:
            self._download(order["id"], file["name"], folder)
        return order

    def _download(self, export: int, name: str, folder: Path) -> None:
        place = (folder / name).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise ServerSaysError(f"the server names a file outside the folder: '{name}'")
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f"{place.name}.part")
        path = f"/exports/{export}/files/{quote(name)}"
        try:
            with self._http.stream("GET", path) as response, part.open("wb") as file:
                if response.is_error:
                    response.read()
                    raise _refusal(response)
                for chunk in response.iter_bytes():
                    file.write(chunk)
        except httpx.TransportError as error:
            part.unlink(missing_ok=True)
            raise self._away(error) from error
        part.replace(place)

    def _stream(self, number: int, after: int | None) -> Iterator[Document]:
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        path = f"/jobs/{number}/events"
        with self._http.stream("GET", path, headers=headers) as response:
            if response.is_error:
                response.read()
                raise _refusal(response)
            kind, data = "", ""
            for line in response.iter_lines():
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    data = line.removeprefix("data: ")
                elif not line and data:
                    yield {"event": kind, **(json.loads(data) or {})}
                    kind, data = "", ""

    def _json(self, method: str, path: str, *, repeat: bool = False, **given: Any) -> Document:
        """A request's answer; one that may be repeated is, while the server is away."""
        end = time.monotonic() + self._patience_s
        may = repeat or method == "GET"
        while True:
            try:
                response = self._http.request(method, path, **given)
            except httpx.TransportError as error:
                if not may or time.monotonic() + PAUSE_S > end:
                    raise self._away(error) from error
                time.sleep(PAUSE_S)
                continue
            if response.status_code == 503 and may and time.monotonic() + PAUSE_S < end:
                time.sleep(float(response.headers.get("Retry-After", PAUSE_S)))
                continue
            if response.is_error:
                raise _refusal(response)
            document: Document = response.json()
            return document

    def _away(self, error: Exception) -> ServerSaysError:
        return ServerSaysError(
            f"no server answers at {self.url} ({error}); start one with `bitfront serve`, or name "
            f"another by --server or ${SERVER}"
        )


def _refusal(response: httpx.Response) -> ServerSaysError:
    try:
        problem = response.json()
        text = str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        problem, text = {}, f"HTTP {response.status_code}: {response.text[:200]}"
    return ServerSaysError(text, response.status_code, problem)
