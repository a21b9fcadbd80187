"""Jobs that outlive whatever is killed: worker, driver, server, database; really, by kill -9."""

import os
import signal
import threading
from collections import Counter

import pytest

from bitfront.config import AUTO
from bitfront.pipeline import SEARCH, run_search
from bitfront.plan import make_plan
from bitfront.progress import Silent
from bitfront.scoring import LIBRARIES_BYTES, USUAL, worker_bytes
from evaluation.arithmetic import DTYPES
from store.claims import holders
from store.database import Store
from store.queries import find_job
from store.submissions import STATES
from store.tables import Measurement
from tests.bitfront.served import Served, tiny_job, wait_for
from tests.bitfront.test_pipeline import small_config
from workers.pool import InProcessPool

LONG = 120
"""Chunks of search text: some thousand measurements, which a test can interrupt."""


@pytest.fixture
def folder(tiny_folders):
    return tiny_folders("llama")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/s.sqlite"
    return request.getfixturevalue("postgres_url")


only_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
only_postgres = pytest.mark.parametrize("url", ["postgresql"], indirect=True)


@pytest.fixture
def served(url, tmp_path, folder):
    server = Served(url, tmp_path / "data", folder)
    yield server
    server.stop()


def count(url):
    with Store(url).reading() as session:
        return session.query(Measurement).count()


def more_than(url, wanted):
    """Wait for more measurements than there are."""
    known = count(url)
    wait_for(f"{wanted} measurements", lambda: count(url) >= known + wanted)


@only_postgres
def test_killed_drivers_and_servers_lose_nothing(served, url, folder):
    """kill -9 of the driver, twice, then of the server: the job ends, nothing is measured again."""
    client = served.start()
    job = client.submit(tiny_job(folder, LONG))["id"]
    known = []
    for _ in range(2):
        more_than(url, 20)
        [driver] = served.drivers()
        known.append(count(url))
        os.kill(driver, signal.SIGKILL)
    more_than(url, 20)
    served.kill()
    [survivor] = served.drivers()  # the driver goes on without its server
    more_than(url, 1)
    client = served.start()
    assert served.drivers() == [survivor]  # and nobody starts a second one
    assert client.job(job)["state"] == "running"
    assert client.wait(job)["state"] == "done"
    begun = [
        event["steps"]
        for event in client.log(job)[0]
        if event["event"] == "stage" and event["label"] == SEARCH and event["seconds"] is None
    ]
    assert len(begun) == 3  # one for each driver, and each had less to do by what was known
    chunks = 4  # of the unquantized model on held-out text
    assert begun[1] <= begun[0] - (known[0] - chunks)
    assert begun[2] <= begun[0] - (known[1] - chunks)
    assert count(url) == begun[0] + chunks * (1 + len(client.front(job)["points"]))


@only_postgres
def test_a_database_that_restarts_is_waited_for(served, url, folder, postgres):
    client = served.start()
    job = client.submit(tiny_job(folder, LONG))["id"]
    more_than(url, 20)
    [driver] = served.drivers()
    postgres.stop()
    postgres.start()
    more_than(url, 20)
    assert served.drivers() == [driver]
    client.cancel(job)
    assert client.job(job)["state"] == "cancelled"


@only_sqlite
def test_cancelled_jobs_stop_and_go_on_when_they_are_resumed(served, url, folder):
    client = served.start()
    wanted = tiny_job(folder, LONG)  # or it is done before its driver looks
    job = client.submit(wanted)["id"]
    more_than(url, 20)
    assert client.cancel(job)["state"] == "cancelled"
    wait_for("the end of the driver", lambda: not served.drivers())
    known = count(url)
    client.resume(job)
    assert client.wait(job)["state"] == "done"
    assert count(url) > known
    states = [event["state"] for event in client.log(job)[0] if event["event"] == "state"]
    assert states == ["running", "cancelled", "queued", "running", "done"]
    assert set(states) <= set(STATES)


@only_sqlite
def test_what_is_wrong_with_a_job_is_said_where_it_is_looked_for(served, url, folder):
    client = served.start()
    bad = client.submit(tiny_job(folder, budgets=[1.01]))["id"]
    found = client.wait(bad)
    assert found["state"] == "failed"
    assert "budget" in found["error"]
    exported = client.submit(tiny_job(folder))["id"]
    assert client.wait(exported)["state"] == "done"
    point = client.front(exported)["points"][0]["id"]
    target = served.data.parent / "export"
    order = client.export(exported, point, ["map", "safetensors"], target)
    assert order["state"] == "done"
    assert (target / "safetensors" / "model.safetensors").stat().st_size > 10_000
    assert order["result"][1]["reloaded_kl"] == pytest.approx(
        order["result"][1]["measured_kl"], rel=0.02
    )
    assert not holders(Store(url), ["export:1"])


class Counting(InProcessPool):
    """Remembers what it measures, over all pools of a test."""

    done: Counter
    lock = threading.Lock()

    def next(self):
        outcome = super().next()
        with self.lock:
            self.done[outcome.task.key] += 1
        return outcome


def test_two_jobs_at_the_same_moment_measure_nothing_twice(url, folder):
    """Two searches of one model that share most maps, side by side, to the end of both."""
    Counting.done = Counter()
    Store(url).open()
    plans = [
        make_plan(small_config(folder, budgets=budgets, random_controls=6))
        for budgets in ([3.0, 3.5, 4.0], [3.0, 3.5, 4.5])
    ]
    jobs = []

    def search(plan):
        jobs.append(run_search(plan, Store(url), Counting, Silent()))

    threads = [threading.Thread(target=search, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(jobs)) == 2
    assert {find_job(Store(url), job).state for job in jobs} == {"done"}
    keyed = {key: times for key, times in Counting.done.items() if key is not None}
    assert set(keyed.values()) == {1}
    assert len(keyed) > count(url) * 0.9


def test_a_worker_is_forecast_to_hold_its_libraries_and_its_largest_task(folder):
    """More for longer text; `auto` stands for what it will be."""
    config = small_config(folder)
    plan = make_plan(config)
    forecast = worker_bytes(plan)
    block = sum(unit.numel for unit in plan.layout.units if unit.layer == 0)
    assert forecast > LIBRARIES_BYTES + 2 * block * DTYPES[plan.dtype].itemsize  # and gradients
    texts = config.texts.model_dump()
    texts["calibration"]["length"] *= 2
    longer = config.model_copy(update={"texts": type(config.texts).model_validate(texts)})
    assert worker_bytes(make_plan(longer)) > forecast
    usual, auto = (
        worker_bytes(make_plan(config.model_copy(update={"estimators": (name,)})))
        for name in (USUAL, AUTO)
    )
    assert usual == auto
