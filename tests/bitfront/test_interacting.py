"""Interactions in a whole search: pairs measured once, the quadratic problem is what they say."""

import numpy as np
import pytest

from bitfront import interacting
from bitfront.fronts import load_front
from bitfront.interacting import measured_pairs, quadratic
from bitfront.pipeline import run_search, spec_of
from bitfront.plan import make_plan
from bitfront.progress import Silent
from bitfront.run import Run
from store.database import Store
from store.queries import candidates_of, find_job
from tests.bitfront.test_pipeline import CountingPool, small_config
from workers.pool import InProcessPool, Task

PAIRED = {"menu": "int2-g32,int3-g32,int4-g32,int8-g32", "interactions": 5}


@pytest.fixture(scope="module")
def paired(tiny_folders, tmp_path_factory):
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('paired')}/s.sqlite").open()
    plan = make_plan(small_config(tiny_folders("llama"), **PAIRED))
    return store, run_search(plan, store, InProcessPool, Silent()), plan


def test_pairs_are_reported_and_their_maps_fit_and_are_measured(paired):
    store, number, _ = paired
    job = find_job(store, number)
    facts = job.facts["interactions"]
    assert facts["used"]
    assert facts["residual"] > interacting.ADDITIVE
    assert len(facts["units"]) == 5
    assert facts["schemes"] == ["int2-g32", "int3-g32"]
    mine = [c for c in candidates_of(store, number) if c.origin.startswith("interactions")]
    assert len(mine) == facts["maps"] > 0
    for candidate in mine:
        assert candidate.weight_bytes <= int(candidate.origin.split()[-2].replace(",", ""))
        assert candidate.predicted_kl is not None
    findings = load_front(store, job).findings
    assert any("pairs of 5 units" in line for line in findings)


def test_the_quadratic_problem_predicts_what_was_measured(paired):
    """With everything else unquantized, two changes cost their singles and their pair."""
    store, number, plan = paired
    with InProcessPool(spec_of(plan, None)) as pool:
        run = Run(plan, store, pool, Silent(), find_job(store, number))
        table = np.where(plan.offered, 1.0, 0.0)
        pairs = measured_pairs(run, table, 4)
        problem = quadratic(plan.problem(table), plan, pairs)
        names = [scheme.name for scheme in plan.menu]
        u, v = pairs.units[0], pairs.units[2]
        low, high = names.index("int2-g32"), names.index("int3-g32")
        choice = plan.offered.argmax(axis=1)
        free = np.setdiff1d(np.flatnonzero(plan.open_units), (u, v))
        choice[free] = names.index("int8-g32")
        alone = problem.problem.loss[np.arange(len(choice)), choice].sum()
        choice[u], choice[v] = low, high
        rest = alone - problem.problem.loss[[u, v], plan.offered.argmax(axis=1)[[u, v]]].sum()
        names = [None] * len(choice)
        names[u], names[v] = "int2-g32", "int3-g32"
        arguments = {"schemes": tuple(names), "ids": plan.texts["calibration"].ids[0]}
        [outcome] = pool.run([Task("measure", arguments)])
    both = problem.total_loss(choice) - rest
    assert both == pytest.approx(outcome.value.kl_sum / outcome.value.tokens, rel=1e-4)


def test_a_second_search_measures_no_pair_again(paired):
    store, _, plan = paired
    CountingPool.methods.clear()
    other = make_plan(plan.config.model_copy(update={"seed": 3}))
    assert other.key != plan.key
    run_search(other, store, CountingPool, Silent())
    assert "measure" in CountingPool.methods or "prepare" in CountingPool.methods
    assert "interactions" not in CountingPool.methods


def test_where_sums_predict_well_no_pairs_are_measured(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(interacting, "ADDITIVE", np.inf)
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    CountingPool.methods.clear()
    plan = make_plan(small_config(tiny_folders("llama"), **PAIRED))
    job = find_job(store, run_search(plan, store, CountingPool, Silent()))
    assert "interactions" not in CountingPool.methods
    assert job.facts["interactions"]["used"] is False
    assert any("no pairs of units were measured" in f for f in load_front(store, job).findings)


def test_a_job_without_interactions_keeps_its_key(tiny_folders):
    folder = tiny_folders("llama")
    plain, none, some = (
        make_plan(small_config(folder, **more)).key
        for more in ({}, {"interactions": 0}, {"interactions": 5})
    )
    assert plain == none != some
