"""The refinement stage of a whole search: better maps, within budget, resumed from the store."""

import numpy as np
import pytest

from bitfront.config import ConfigError, Menu
from bitfront.fronts import load_front, losses
from bitfront.pipeline import run_search
from bitfront.plan import make_plan
from bitfront.progress import Silent
from bitfront.refining import SLOPES, _keys
from bitfront.run import Run
from quantization.errors import BankError, MeasurementError
from search.errors import SearchError
from search.strategies import Question
from store.database import Store
from store.queries import candidates_of, find_job
from store.tables import SensitivityShare
from tests.bitfront.test_pipeline import CountingPool, small_config
from workers.pool import InProcessPool, Outcome

REFINED = {
    "menu": "int2-g32,int3-g32,int4-g32,int8-g32",
    "estimators": ["weight-error"],
    "texts.search.chunks": 6,
    "refinement.measurements": 60,
    "random_controls": 1,
}


@pytest.fixture(scope="module")
def refined(tiny_folders, tmp_path_factory):
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('refined')}/s.sqlite").open()
    plan = make_plan(small_config(tiny_folders("llama"), **REFINED))
    return store, run_search(plan, store, InProcessPool, Silent()), plan


def kl_of(store, plan, job, candidates):
    run = Run(plan, store, None, Silent(), find_job(store, job))
    found = losses(store, run.quality, candidates, plan.texts["search"].hashes)
    return {map_hash: loss.kl.mean for map_hash, loss in found.items()}


def test_refined_maps_fit_and_measure_better_than_what_they_began_with(refined):
    store, job, plan = refined
    candidates = candidates_of(store, job)
    kl = kl_of(store, plan, job, candidates)
    facts = find_job(store, job).facts["refinement"]
    assert facts["measurements"] == 60
    better = 0
    for entry in facts["budgets"]:
        origin = f"refined, at most {entry['budget']:,} bytes"
        mine = [c for c in candidates if c.origin == origin]
        others = [
            kl[c.map_hash]
            for c in candidates
            if c.weight_bytes <= entry["budget"] and not c.origin.startswith("refined")
        ]
        for candidate in mine:
            assert candidate.weight_bytes <= entry["budget"]
            better += kl[candidate.map_hash] < min(others)
    assert better >= 2
    finalists = [c for c in candidates if c.finalist and c.origin.startswith("refined")]
    assert {c.point for c in finalists} <= {
        p.id for p in load_front(store, find_job(store, job)).points
    }
    assert finalists


def test_a_killed_refinement_goes_on_where_it_was(tiny_folders, refined, tmp_path):
    """And ends with the same maps; nothing is measured twice."""
    whole, job, plan = refined
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()

    class Stopping(InProcessPool):
        def next(self) -> Outcome:
            outcome = super().next()
            if slopes_in(store) >= 20:
                return Outcome(outcome.task, error=BankError("disk full"))
            return outcome

    with pytest.raises(BankError):
        run_search(plan, store, Stopping, Silent())
    assert slopes_in(store) == 20
    CountingPool.methods.clear()
    again = run_search(plan, store, CountingPool, Silent())
    assert CountingPool.methods.count("slopes") == slopes_in(whole) - 20
    assert [c.map_hash for c in candidates_of(store, again)] == [
        c.map_hash for c in candidates_of(whole, job)
    ]


def slopes_in(store) -> int:
    with store.session() as session:
        return session.query(SensitivityShare).filter_by(estimator=SLOPES).count()


def test_a_model_that_slopes_fail_on_keeps_its_front(tiny_folders, tmp_path):
    class Broken(InProcessPool):
        def next(self) -> Outcome:
            outcome = super().next()
            if outcome.task.method == "slopes":
                return Outcome(outcome.task, error=MeasurementError("it can't be cut"))
            return outcome

    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    plan = make_plan(small_config(tiny_folders("llama"), **REFINED))
    job = find_job(store, run_search(plan, store, Broken, Silent()))
    assert job.state == "done"
    assert job.facts["refinement"] == {"failed": "it can't be cut"}
    assert load_front(store, job).points


def test_a_job_without_refinement_keeps_its_key(tiny_folders):
    folder = tiny_folders("llama")
    plain, none, some = (
        make_plan(small_config(folder, **more)).key
        for more in ({}, {"refinement.measurements": 0}, {"refinement.measurements": 5})
    )
    assert plain == none != some
    with pytest.raises(ConfigError, match="refinement.measurements"):
        small_config(folder, **{"refinement.measurements": -1})


@pytest.mark.parametrize("strategy", ["evolve", "optuna:NSGAIISampler"])
def test_other_strategies_drive_the_same_workers(tiny_folders, tmp_path, strategy):
    """Without slopes; Optuna's study lies in the job's own database."""
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    more = {**REFINED, "refinement.strategy": strategy, "budgets": [4.0]}
    plan = make_plan(small_config(tiny_folders("llama"), **more))
    job = run_search(plan, store, CountingPool, Silent())
    facts = find_job(store, job).facts["refinement"]
    assert facts["measurements"] == 60
    assert any(entry["steps"] for entry in facts["budgets"])
    assert slopes_in(store) == 0
    if strategy.startswith("optuna"):
        import optuna

        study = optuna.load_study(study_name=f"job {job}", storage=store.url)
        assert len(study.trials) >= 10


def test_an_unknown_strategy_is_refused_before_anything_runs(tiny_folders):
    with pytest.raises(SearchError, match="no strategy 'genetic'"):
        make_plan(small_config(tiny_folders("llama"), **{"refinement.strategy": "genetic"}))


def test_what_was_found_before_a_failure_counts(tiny_folders, refined, tmp_path):
    """NaN on one map after many questions: the job has the better maps, and says why it stopped."""

    class Failing(InProcessPool):
        slopes = 0

        def next(self) -> Outcome:
            outcome = super().next()
            if outcome.task.method != "slopes":
                return outcome
            self.slopes += 1
            if self.slopes > 30:
                return Outcome(outcome.task, error=MeasurementError("NaN"))
            return outcome

    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    plan = make_plan(small_config(tiny_folders("llama"), **REFINED, seed=5))
    # only the refinement fails, so everything before it comes from the store of the whole job
    job = find_job(store, run_search(plan, store, Failing, Silent()))
    facts = job.facts["refinement"]
    assert facts["failed"] == "NaN"
    assert any(entry["changed"] for entry in facts["budgets"])
    assert [c for c in candidates_of(store, job.id) if c.origin.startswith("refined")]


def test_slopes_are_kept_by_what_every_unit_is_offered(tiny_folders):
    """A job that forbids a scheme stores nothing of it, which must not pass for zero elsewhere."""
    folder, keys = tiny_folders("llama"), []
    menu = {"schemes": ["int2-g32", "int4-g32"], "pinned": {"embedding": "bf16", "head": "bf16"}}
    for forbidden in ({}, {"*.down_proj": ["int2-g32"]}):
        config = small_config(folder).model_copy(
            update={"menu": Menu.model_validate({**menu, "forbidden": forbidden})}
        )
        plan = make_plan(config)
        choice = plan.offered.argmin(axis=1) * 0 + plan.offered.shape[1] - 1
        choice = np.where(
            plan.offered[np.arange(len(choice)), choice], choice, plan.offered.argmax(1)
        )
        run = Run(plan, None, None, Silent(), None)
        keys.append(_keys(run, Question(choice, 0, slopes=True)))
    assert keys[0][0] == keys[1][0]
    assert keys[0][1] != keys[1][1]


def test_how_to_refine_without_how_long_is_refused(tiny_folders):
    with pytest.raises(ConfigError, match="--refine"):
        make_plan(small_config(tiny_folders("llama"), **{"refinement.strategy": "evolve"}))
