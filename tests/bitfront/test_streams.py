"""Streams of events: how many there may be, and that a revoked token's ends."""

import threading
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from bitfront.server.app import create_app
from bitfront.server.settings import Settings
from store.database import Store
from store.submissions import submit_job
from store.tokens import create_token, revoke_token
from tests.bitfront.served import wait_for


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A store with a job that waits, a token, and the address of the job's events."""
    monkeypatch.setattr("bitfront.server.jobs.WATCH_S", 0.05)
    monkeypatch.setattr("bitfront.server.jobs.CHECK_S", 0.1)
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    job = submit_job(store, {"model": "demo"}, {}).id
    token = create_token(store, "alice", "read")
    app = create_app(Settings(store.url, tmp_path, auth=True, version="1"), store)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for("a server", lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=10) as http:
        yield store, http, f"/api/v1/jobs/{job}/events"
    server.should_exit = True
    thread.join(timeout=10)


@contextmanager
def stream(http, address):
    """The lines of one that has begun."""
    with http.stream("GET", address) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines) == "event: state"
        yield lines


def test_a_revoked_tokens_stream_ends(served):
    store, http, address = served
    with stream(http, address) as lines:
        revoke_token(store, "alice")
        list(lines)  # or it would time out: the job still waits
    assert http.get(address).status_code == 401


def test_one_stream_more_than_there_may_be_is_told_so(served, monkeypatch):
    _, http, address = served
    monkeypatch.setattr("bitfront.server.jobs.MOST_STREAMS", 1)
    with stream(http, address):
        refused = http.get(address)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) > 0
        assert "1 streams" in refused.json()["detail"]

    def free():
        with http.stream("GET", address) as response:
            return response.status_code == 200

    wait_for("a free place", free)
