"""The audit end to end on a tiny model: measured, resumed, stored, taken as the default."""

import json
import os
import subprocess

import numpy as np
import pytest

from bitfront.audit_views import audit_json, audit_remarks, audit_table
from bitfront.auditing import AuditOptions, run_audit
from bitfront.config import UNPROVEN
from bitfront.fronts import load_front
from bitfront.pipeline import run_search
from bitfront.plan import make_plan
from bitfront.progress import Silent
from bitfront.report import write_report
from bitfront.settling import settled
from quantization.errors import MeasurementError
from sensitivity import ESTIMATORS
from store.database import Store
from store.queries import find_job
from tests.bitfront.test_pipeline import CountingPool, small_config
from workers.pool import InProcessPool

OPTIONS = AuditOptions(mixed=12, equal=8, flips=6, pairs=3)


@pytest.fixture(scope="module")
def audited(tiny_folders, tmp_path_factory):
    """A searched and audited job: store, plan, job."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('audit')}/s.sqlite").open()
    plan = make_plan(small_config(tiny_folders("llama"), estimators=["fisher", "output-error"]))
    run_search(plan, store, InProcessPool, Silent())
    return store, plan, run_audit(plan, store, InProcessPool, Silent(), OPTIONS)


def test_every_estimator_is_judged_and_the_best_one_is_the_default(audited):
    _, _, job = audited
    document = audit_json(job.facts["audit"])
    assert {entry["name"] for entry in document["estimators"]} == set(ESTIMATORS)
    for entry in document["estimators"]:
        assert set(entry) == {"name", "spearman", "kendall", "spearman_equal_bits", "seconds"}
        assert entry["seconds"] > 0
    best = max(document["estimators"], key=lambda entry: entry["spearman_equal_bits"])
    assert document["default"] == best["name"] == document["estimators"][0]["name"]
    json.dumps(document, allow_nan=False)


def test_maps_of_equal_size_have_equal_size(audited):
    _, plan, job = audited
    measured = job.facts["audit"]["measured"]
    groups = {g for g in measured["group"] if g.startswith("equal")}
    sizes = {g.split()[-1] for g in groups}
    assert groups == {f"{kind} {s}" for s in sizes for kind in ("equal", "equal near")}
    for group in groups:
        bits = [b for b, g in zip(measured["bits"], measured["group"], strict=True) if g == group]
        assert np.ptp(bits) < 1e-9
        assert f"{bits[0]:.4g}" == group.split()[-1]


def test_a_second_audit_measures_nothing_again(audited):
    store, plan, job = audited
    CountingPool.methods.clear()
    again = run_audit(plan, store, CountingPool, Silent(), OPTIONS)
    assert CountingPool.methods == ["prepare"]
    assert {**again.facts["audit"], "audited_at": ""} == {**job.facts["audit"], "audited_at": ""}


def test_an_audit_of_fewer_maps_or_estimators_reuses_the_others(audited):
    store, plan, _ = audited
    CountingPool.methods.clear()
    found = run_audit(
        plan, store, CountingPool, Silent(), AuditOptions(("fisher",), mixed=12, equal=8, flips=6)
    )
    assert CountingPool.methods == ["prepare"]
    assert {entry["name"] for entry in found.facts["audit"]["estimators"]} == set(ESTIMATORS)
    run_audit(plan, store, InProcessPool, Silent(), OPTIONS)


def test_searches_that_say_auto_take_the_winner_and_show_why(audited, tiny_folders, tmp_path):
    store, plan, job = audited
    auto = make_plan(small_config(tiny_folders("llama"), estimators=["auto"]))
    found = settled(auto, store)
    assert found.config.estimators == (job.facts["audit"]["default"],)
    assert f"job {job.id}" in found.because
    assert found.key != auto.key  # another winner is another question
    fresh = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    assert settled(auto, fresh).config.estimators == UNPROVEN
    assert settled(plan, store) is plan
    beside = make_plan(small_config(tiny_folders("llama"), estimators=["higgs", "auto"]))
    assert settled(beside, fresh).config.estimators == ("higgs", *UNPROVEN)
    other = {"estimators": ["auto"], "menu": "int4-g32,int8-g32"}  # audited with another menu
    assert (
        settled(make_plan(small_config(tiny_folders("llama"), **other)), store).config.estimators
        == UNPROVEN
    )
    number = run_search(auto, store, InProcessPool, Silent())
    searched = find_job(store, number)
    assert searched.facts["predicts"] == job.facts["audit"]["default"]
    assert searched.facts["estimators_because"] == found.because
    latest = find_job(store, job.id).facts["audit"]  # other tests have audited again
    assert searched.facts["evidence"] == {"job": job.id, **latest}
    page = tmp_path / "search.html"
    write_report(load_front(store, searched), page)
    assert f"by the audit of job {job.id}" in page.read_text()
    assert audit_remarks(job.facts["audit"])[0][:60] in page.read_text()


def test_the_audit_is_shown(audited, tmp_path):
    store, _, job = audited
    audit = job.facts["audit"]
    assert len(audit_table(job.id, audit).rows) == len(list(ESTIMATORS))
    assert audit["default"] in audit_remarks(audit)[0]
    assert len(audit["interactions"]["units"]) == 3
    assert any("than the sum of both" in line for line in audit_remarks(audit))
    page = tmp_path / "page.html"
    write_report(load_front(store, find_job(store, job.id)), page)
    text = page.read_text()
    assert "Predictions audited against measurements" in text
    assert "weight-error" in text


def test_experts_report_their_tokens(tiny_folders, tmp_path):
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    plan = make_plan(small_config(tiny_folders("mixtral")))
    options = AuditOptions(("fisher", "output-error"), mixed=4, equal=0, flips=0)
    job = run_audit(plan, store, InProcessPool, Silent(), options)
    experts = job.facts["audit"]["experts"]
    kinds = [unit.name for unit in plan.layout.units if unit.kind == "experts"]
    assert [entry["unit"] for entry in experts] == kinds
    tokens = plan.texts["calibration"].ids.size
    for entry in experts:
        assert sum(entry["tokens"]) == 2 * tokens  # two experts a token
        assert entry["few"] == sum(t < 64 for t in entry["tokens"])
    assert any("experts saw few tokens" in line for line in audit_remarks(job.facts["audit"]))
    number = run_search(plan, store, InProcessPool, Silent())
    searched = find_job(store, number)
    assert [entry["unit"] for entry in searched.facts["experts"]] == kinds
    findings = load_front(store, searched).findings
    assert any("experts saw few tokens" in line for line in findings)


def test_the_command(audited, bitfront_command):
    store, _, job = audited
    command = [bitfront_command, "audit", str(job.id), "--json", "--address", "none",
               "--maps", "12", "--equal-maps", "8", "--flips", "6"]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "BITFRONT_STORE": store.url}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert document["default"] == job.facts["audit"]["default"]
    bad = subprocess.run(
        [bitfront_command, "audit", "--estimators", "fischer"],
        env={**os.environ, "BITFRONT_STORE": store.url}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert bad.returncode == 1
    assert "nearest: fisher" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_an_estimator_that_fails_leaves_the_others_tables_alone(
    tiny_folders, tmp_path, monkeypatch
):
    """Its open tasks must not answer for those of the next ones."""
    from workers.session import Session

    honest = Session.estimate

    def estimate(self, estimator, chunks, share):
        if estimator == "output-error":
            raise MeasurementError("not of this model")
        return honest(self, estimator, chunks, share)

    config = small_config(tiny_folders("llama"), **{"texts.calibration.chunks": 12})
    names = ("output-error", "fisher", "fisher-quantized", "row-fisher")
    found = []
    for broken in (True, False):
        with monkeypatch.context() as patch:
            if broken:
                patch.setattr(Session, "estimate", estimate)
            store = Store(f"sqlite:///{tmp_path}/{broken}.sqlite").open()
            options = AuditOptions(names if broken else names[1:], 4, 0, 2)
            job = run_audit(make_plan(config), store, InProcessPool, Silent(), options)
        audit = job.facts["audit"]
        assert ("output-error" in audit["unable"]) == broken
        found.append({e["name"]: e["spearman"] for e in audit["estimators"]})
    for name in names[1:]:
        assert found[0][name] == found[1][name]
