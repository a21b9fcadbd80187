"""Searches as jobs of a Ray cluster: they go on without the server that submitted them."""

import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from tests.bitfront.served import Served, free_port, tiny_job, wait_for
from workers.launching import jobs_address


@pytest.fixture(scope="module")
def cluster():
    """A head on loopback with its Jobs API, as `ray start --head` makes it."""
    folder = Path(tempfile.mkdtemp(prefix="r"))  # Ray's sockets in it want a short path
    ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port",
                                            "ray-client-server-port")}  # fmt: skip
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}",
        *(f"--{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    # drivers of the cluster are started as `python`, and find this one
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "PYTHONPATH": str(Path(__file__).parents[2]),
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex * 2}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in more.items():
            patch.setenv(name, value)
        yield from _started(command, ports["dashboard-port"], folder / "head.log")
    shutil.rmtree(folder, ignore_errors=True)


def _started(command, port, log):
    with log.open("wb") as output:
        head = subprocess.Popen(command, stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}"

    asked = urllib.request.Request(f"{address}/api/version")  # Ray's own client reads tokens once
    asked.add_header("Authorization", f"Bearer {os.environ['RAY_AUTH_TOKEN']}")

    def answers():
        assert head.poll() is None, log.read_text()
        with suppress(OSError), urllib.request.urlopen(asked) as found:
            return found.status == 200
        return False

    wait_for("a cluster", answers)
    yield address
    head.terminate()
    head.wait(timeout=30)


def test_a_ray_job_survives_the_server_that_submitted_it(cluster, tiny_folders, tmp_path):
    folder = tiny_folders("llama")
    url = f"sqlite:///{tmp_path}/s.sqlite"
    served = Served(url, tmp_path / "data", folder, ray=cluster)
    try:
        client = served.start()
        job = client.submit(tiny_job(folder, 20), {"workers": 2, "cpus": 0.5})["id"]
        wait_for("a driver", served.drivers)
        served.kill()
        wait_for("the end of the driver", lambda: not served.drivers())
        client = served.start()
        found = client.job(job)
        assert found["state"] == "done", found["error"]
        assert client.front(job)["points"]
        begun = [e for e in client.log(job)[0] if "begins" in e.get("text", "")]
        assert len(begun) == 1
    finally:
        served.stop()


def test_addresses_of_a_cluster():
    assert jobs_address("ray://head:10001") == "http://head:8265"
    assert jobs_address("http://head:8265") == "http://head:8265"
    assert jobs_address("auto") is None
