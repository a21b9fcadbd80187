"""A real server in a process of its own, and what tests do to it."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from bitfront.client import Client
from store.claims import held
from store.database import Store

PATIENCE_S = 120


class Served:
    """`bitfront serve` on a free port of loopback; started, killed and started again."""

    def __init__(self, url: str, data: Path, root: Path, *more: str, ray: str = "none") -> None:
        self.url, self.data = url, data
        self.port = free_port()
        self._arguments = ["--store", url, "--data", str(data), "--allow", str(root), "--ray", ray,
                           "--port", str(self.port), *more]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.log = data.parent / f"{data.name}.log"

    def start(self) -> Client:
        """Start, and wait until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bitfront", "serve", *self._arguments],
                stdout=log, stderr=log,
            )  # fmt: skip
        wait_for("an answer", self._answers)
        return Client(f"http://127.0.0.1:{self.port}", patience_s=PATIENCE_S)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """As Ctrl-C would; and no driver is left behind."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=40)
            self.process.kill()
        for driver in self.drivers():
            with suppress(ProcessLookupError):
                os.kill(driver, signal.SIGKILL)

    def drivers(self) -> list[int]:
        """The processes that hold a job."""
        owners = held(Store(self.url), "job:").values()
        return [int(owner.rsplit("/", 2)[1]) for owner in owners]


def wait_for(what, found, patience_s=PATIENCE_S):
    """What a question answers, once that isn't nothing."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen in {patience_s} s")


def tiny_job(folder: Path, search_chunks=3, **more):
    """A job of a few seconds, as people submit it."""
    chunks = {"calibration": 2, "search": search_chunks, "heldout": 4}
    return {
        "model": str(folder), "menu": ["int2-g32", "int4-g32", "int8-g32"], "dtype": "float32",
        "estimators": ["fisher"], "texts": {r: {"length": 32, "chunks": n} for r, n in chunks.items()},
        **more,
    }  # fmt: skip


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
