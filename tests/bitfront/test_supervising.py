"""The supervisor and what it starts: every submitted job has one driver, whatever that comes to."""

import time

import pytest

from bitfront.driving import StoreProgress, _alone
from bitfront.server.policy import check_again
from bitfront.server.supervising import MOST_ATTEMPTS, Supervisor
from quantization.errors import WorkerError
from store.claims import JOB, claim, holders
from store.database import Store, absolute
from store.queries import find_job
from store.submissions import cancel_job, order_export, resume_job, start_job, submit_job
from workers.launching import Launcher, LocalLauncher

OTHER = "another-machine/1/00"


class Recorder(Launcher):
    """Starts nothing, and remembers what it was asked for."""

    address = "none"

    def __init__(self, *, away=False, dies=False):
        self.started: list[str] = []
        self.away, self.dies = away, dies

    def start(self, name, arguments, environment):
        if self.away:
            raise WorkerError("no cluster")
        self.started.append(name)

    def reap(self):
        pass

    def ended(self, name):
        return self.dies


@pytest.fixture
def store(tmp_path):
    return Store(f"sqlite:///{tmp_path}/s.sqlite").open()


def submit(store, **more):
    return submit_job(store, {"model": "demo", **more}, {}).id


def test_a_job_has_one_driver_and_several_wait_their_turn(store):
    jobs = [submit(store) for _ in range(3)]
    launcher = Recorder()
    supervisor = Supervisor(store, launcher, most=2)
    for _ in range(3):
        supervisor.look()
    assert launcher.started == [f"job-{number}" for number in jobs[:2]]
    claim(store, OTHER, [f"{JOB}{jobs[0]}"])  # the first one's driver is there, and ends
    start_job(store, jobs[0])
    cancel_job(store, jobs[0])
    supervisor.look()
    assert launcher.started == [f"job-{number}" for number in jobs[:2]]


def test_two_servers_start_one_driver(store):
    job = submit(store)
    launchers = [Recorder(), Recorder()]
    for supervisor in [Supervisor(store, launcher, most=2) for launcher in launchers]:
        supervisor.look()
    assert launchers[0].started + launchers[1].started == [f"job-{job}"]


def test_exports_do_not_wait_behind_jobs(store):
    job = submit(store)
    submit(store)
    order_export(store, job, 1, ["map"], None)
    launcher = Recorder()
    Supervisor(store, launcher, most=1).look()
    assert launcher.started == ["export-1"]


def test_drivers_that_get_nowhere_fail_the_job_which_can_be_resumed(store):
    job = submit(store)
    launcher = Recorder(dies=True)
    supervisor = Supervisor(store, launcher, most=2)
    for _ in range(MOST_ATTEMPTS + 2):
        supervisor.look()
    assert launcher.started == [f"job-{job}"] * MOST_ATTEMPTS
    found = find_job(store, job)
    assert found.state == "failed"
    assert "died 3 times" in found.error
    resume_job(store, job)
    supervisor.look()
    assert len(launcher.started) == MOST_ATTEMPTS + 1


def test_only_work_done_gives_a_driver_new_attempts(store):
    """One that dies at the same place each time is given up, though it says where it is."""
    job = submit(store)
    supervisor = Supervisor(store, Recorder(dies=True), most=2)
    for _ in range(MOST_ATTEMPTS):
        supervisor.look()
        with StoreProgress(store, job).stage("a stage that kills", 10):
            pass
    supervisor.look()
    assert find_job(store, job).state == "failed"


def test_a_cluster_that_is_away_costs_no_attempt(store):
    job = submit(store)
    launcher = Recorder(away=True)
    supervisor = Supervisor(store, launcher, most=2)
    for _ in range(MOST_ATTEMPTS + 2):
        supervisor.look()
        claim(store, supervisor._owner, [f"launch:{JOB}{job}"], lease_s=-1)  # its pause is over
    assert find_job(store, job).state == "queued"
    launcher.away = False
    supervisor.look()
    assert launcher.started == [f"job-{job}"]


def test_what_came_past_the_routes_is_checked_before_it_runs(store):
    """Submitted to the store itself, with the model's own code."""
    bad = submit(store, trust_remote_code=True)
    launcher = Recorder()
    Supervisor(store, launcher, 2, check=lambda config: check_again(config, ())).look()
    assert launcher.started == []
    found = find_job(store, bad)
    assert found.state == "failed"
    assert "runs no code of models" in found.error


@pytest.mark.parametrize("rival", [False, True])
def test_a_claim_that_ran_out_is_taken_again_unless_somebody_has_it(store, monkeypatch, rival):
    """As after a database was away for longer than a lease."""
    monkeypatch.setattr("bitfront.driving.WATCH_S", 0.1)
    ended = True
    with _alone(store, "job:1", lambda: True) as mine:
        assert mine
        [owner] = holders(store, ["job:1"]).values()
        claim(store, owner, ["job:1"], lease_s=-1)
        if rival:
            claim(store, OTHER, ["job:1"])
        for _ in range(10):
            time.sleep(0.1)
        ended = False
        assert holders(store, ["job:1"]) == {"job:1": owner}
    assert ended == rival


def test_drivers_find_a_store_that_was_named_by_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = absolute("sqlite:///team.sqlite")
    assert url == f"sqlite:///{tmp_path}/team.sqlite"
    assert absolute(url) == url
    for same in ("postgresql+psycopg://me:secret@host/db", "sqlite://", "nonsense"):
        assert absolute(same) == same


def test_processes_that_ended_are_let_go(tmp_path):
    launcher = LocalLauncher(tmp_path / "data", "none")
    launcher.start("job-1", ["--version"], {})
    child = launcher._children["job-1"]
    child.wait(timeout=60)
    assert launcher.ended("job-1")
    assert launcher._children == {}
    assert not launcher.ended("job-2")
