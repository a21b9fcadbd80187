"""Pruning: what fronts, exports and unfinished jobs refer to stays, whatever its age."""

from datetime import UTC, datetime, timedelta

import pytest

from store.claims import claim
from store.database import Store
from store.events import add_event, events_after
from store.queries import (
    measurements,
    open_job,
    reference_hash,
    save_candidates,
    save_measurement,
    save_model,
    update_job,
)
from store.retention import prune
from store.submissions import order_export
from store.tables import Candidate, Event, Job, Measurement, Model

OLD = datetime.now(UTC) - timedelta(days=200)
CUT = datetime.now(UTC) - timedelta(days=90)
MODEL, GONE = "a" * 64, "b" * 64


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, tmp_path):
    url = (
        f"sqlite:///{tmp_path}/s.sqlite"
        if request.param == "sqlite"
        else request.getfixturevalue("postgres_url")
    )
    opened = Store(url).open()
    for weights in (MODEL, GONE):
        save_model(opened, Model(weights_hash=weights, name=weights[:4], layout={}))
    return opened


def candidate(job, map_hash, point=1, *, finalist=True):
    return Candidate(
        job_id=job.id, point=point, map_hash=map_hash, origin="o", schemes=[], weight_bytes=1,
        average_bits=4.0, finalist=finalist,
    )  # fmt: skip


def measured(store, key, map_hash, weights=MODEL, at=OLD):
    save_measurement(
        store,
        Measurement(
            key=key, weights_hash=weights, map_hash=map_hash, chunk_hash="c", quantizer="q",
            dtype="d", kl_sum=1.0, nll_sum=1.0, tokens=1, seconds=0.1, measured_at=at,
        ),
    )  # fmt: skip


def aged(store, job, **columns):
    """The job as it was long ago."""
    update_job(store, job.id, **columns, updated_at=OLD)


def test_pruning_keeps_what_is_referred_to(store):
    done, failed = (open_job(store, key, MODEL, {}) for key in ("done", "failed"))
    exported, empty = (open_job(store, key, MODEL, {}) for key in ("exported", "empty"))
    save_candidates(store, [candidate(done, "front"), candidate(done, "lost", 2, finalist=False)])
    save_candidates(store, [candidate(failed, "half", finalist=False)])
    order_export(store, exported.id, 1, ["map"], None)
    aged(store, done, state="done")
    for job in (failed, exported, empty):
        aged(store, job, state="failed")
    measured(store, "1", "front")
    measured(store, "2", "lost")  # a candidate: the job would measure it again
    measured(store, "3", reference_hash(MODEL))
    measured(store, "4", "audited")
    measured(store, "5", "audited too", at=datetime.now(UTC))
    measured(store, "6", "half")
    add_event(store, failed.id, "log", text="x", level="info")
    with store.session() as session:
        session.query(Event).update({"at": OLD})
    claim(store, "machine/1/00", ["k"], lease_s=-1)

    counted = prune(store, CUT, really=False).to_json()
    assert len(measurements(store, list("123456"))) == 6
    gone = prune(store, CUT, really=True).to_json()
    assert gone == counted
    assert gone == {"jobs": 2, "measurements": 2, "sensitivity_shares": 0, "events": 1, "claims": 1}
    assert set(measurements(store, list("123456"))) == {"1", "2", "3", "5"}
    with store.reading() as session:
        assert {job.id for job in session.query(Job)} == {done.id, exported.id}
    assert events_after(store, failed.id) == []
    assert prune(store, CUT, really=True).to_json() == dict.fromkeys(gone, 0)


def test_nothing_of_a_model_at_work_goes(store):
    job = open_job(store, "running", MODEL, {})
    measured(store, "1", "refined")
    measured(store, "2", "refined", GONE)
    assert prune(store, CUT, really=True).measurements == 1
    assert set(measurements(store, ["1", "2"])) == {"1"}
    assert job.state == "running"


def test_young_jobs_stay_even_if_they_failed(store):
    job = open_job(store, "failed", MODEL, {})
    update_job(store, job.id, state="failed")
    assert prune(store, CUT, really=True).jobs == 0
