"""Starting drivers: as processes of this machine, or as jobs of a Ray cluster.

Both outlive whoever starts them. A driver proves by its claim in the store that it lives; a launcher
only says whether one that it has started is known to have ended, so that nobody waits for its lease.
"""

import os
import shlex
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantization.errors import WorkerError

STORE = "BITFRONT_STORE"


class Launcher(ABC):
    """Starts `bitfront` commands that go on by themselves."""

    address: str
    """What drivers connect to Ray with."""

    @abstractmethod
    def start(self, name: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        """Start `bitfront ARGUMENTS`; returns at once.

        Raises:
            WorkerError: it can't be started.
        """

    @abstractmethod
    def reap(self) -> None:
        """Let go what has ended; called now and then."""

    @abstractmethod
    def ended(self, name: str) -> bool:
        """Whether the latest one of that name, if this launcher knows it, has ended."""


class LocalLauncher(Launcher):
    """Processes of this machine, each with a Ray of its own, in sessions of their own.

    Args:
        folder: of their logs, and an empty one that they work in, so that no name of a model or
            text means a file by chance.
        address: `local`, or `none` for no Ray at all.
    """

    def __init__(self, folder: Path, address: str = "local") -> None:
        self.address, self._folder = address, folder
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: set[str] = set()
        (folder / "empty").mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)

    def start(self, name: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        """See `Launcher.start`."""
        self._ended.discard(name)
        try:
            with (self._folder / "logs" / f"{name}.log").open("ab") as log:
                self._children[name] = subprocess.Popen(  # noqa: S603  # our own command
                    [sys.executable, "-m", "bitfront", *arguments],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    cwd=self._folder / "empty", env={**os.environ, **environment},
                )  # fmt: skip
        except OSError as error:
            raise WorkerError(f"can't start a driver ({error})") from error

    def reap(self) -> None:
        """See `Launcher.reap`."""
        for name, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[name]
                self._ended.add(name)

    def ended(self, name: str) -> bool:
        """See `Launcher.ended`."""
        self.reap()
        return name in self._ended

    def stop(self) -> None:
        """Ask all that it has started to end; their jobs go on when a server starts them again."""
        for child in self._children.values():
            if child.poll() is None:
                child.terminate()
        for child in self._children.values():
            try:
                child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                child.kill()


class RayLauncher(Launcher):
    """Jobs of a Ray cluster on which Bitfront is installed.

    Args:
        address: of its Jobs API (`http://head:8265`), of its client server (`ray://head:10001`),
            or `auto` for a cluster that this machine belongs to.
    """

    address = "auto"

    def reap(self) -> None:
        """See `Launcher.reap`: Ray keeps its jobs itself."""

    def __init__(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        self._names: dict[str, str] = {}
        try:
            self._client: Any = JobSubmissionClient(jobs_address(address))
        except Exception as error:  # it raises what aiohttp, requests and grpc raise
            raise WorkerError(
                f"can't reach Ray's Jobs API at '{jobs_address(address)}' ({_line(error)}); start "
                "the cluster with its dashboard (`ray start --head`), and give its address "
                "(http://HEAD:8265) by --ray; where it wants its token, set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN here, too"
            ) from error

    def start(self, name: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        """See `Launcher.start`."""
        command = shlex.join(["python", "-m", "bitfront", *arguments])
        try:
            self._names[name] = self._client.submit_job(
                entrypoint=command, metadata={"bitfront": name},
                runtime_env={"env_vars": environment},
            )  # fmt: skip
        except Exception as error:
            raise WorkerError(f"Ray did not take the job ({_line(error)})") from error

    def ended(self, name: str) -> bool:
        """See `Launcher.ended`."""
        if name not in self._names:
            return False
        try:
            return bool(self._client.get_job_status(self._names[name]).is_terminal())
        except Exception:  # the cluster is away: leases tell the rest
            return False


def jobs_address(address: str) -> str | None:
    """The Jobs API that an address means: the dashboard's port is Ray's usual one."""
    if address == "auto":
        return None
    if address.startswith("ray://"):
        return f"http://{address.removeprefix('ray://').rpartition(':')[0]}:8265"
    return address


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
