"""The job end to end on a tiny model: measured once, resumed, compared, exported."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import ClassVar

import numpy as np
import pytest
import torch

from bitfront.config import JobConfig, load_config
from bitfront.exporting import export_point
from bitfront.fronts import Constraints, best_point, load_front
from bitfront.pipeline import run_search
from bitfront.plan import make_plan
from bitfront.progress import Silent
from bitfront.resolving import solve_again
from quantization.errors import BankError, BitfrontError, MeasurementError, UnknownNameError
from quantization.imatrix import write_imatrix
from search.errors import InfeasibleBudgetError
from search.exact import solve
from store.database import Store
from store.queries import candidates_of, find_job, key_of, update_job
from store.tables import Measurement, SensitivityShare
from workers.pool import InProcessPool, Outcome

SMALL = {"texts.calibration.chunks": 2, "texts.search.chunks": 2, "texts.heldout.chunks": 4,
         "texts.calibration.length": 32, "texts.search.length": 32, "texts.heldout.length": 32,
         "menu": "int2-g32,int4-g32,int8-g32", "dtype": "float32",
         "estimators": ["fisher", "output-error"], "refinement.measurements": 0}  # fmt: skip


def small_config(folder, **more) -> JobConfig:
    base = {k: v for k, v in SMALL.items() if k != "menu" or not any("menu." in m for m in more)}
    return load_config(str(folder), None, {**base, **more})


def size(point) -> int:
    return point.size_bytes


class CountingPool(InProcessPool):
    """Remembers what it runs."""

    methods: ClassVar[list[str]] = []

    def next(self) -> Outcome:
        outcome = super().next()
        self.methods.append(outcome.task.method)
        return outcome


@pytest.fixture
def store(tmp_path):
    return Store(f"sqlite:///{tmp_path}/s.sqlite").open()


@pytest.fixture(scope="module")
def done(tiny_folders, tmp_path_factory):
    """A finished job: store, number, plan."""
    opened = Store(f"sqlite:///{tmp_path_factory.mktemp('done')}/s.sqlite").open()
    plan = make_plan(small_config(tiny_folders("llama")))
    return opened, run_search(plan, opened, InProcessPool, Silent()), plan


def test_the_front_is_measured_and_has_its_controls(done):
    store, job, plan = done
    front = load_front(store, find_job(store, job))
    controls = {p.control for p in front.points}
    assert controls == {None, "uniform", "random"}
    assert len([p for p in front.points if p.control == "uniform"]) == 3
    for point in front.points:
        assert point.kl_low <= point.kl <= point.kl_high
        assert point.perplexity > 1
        assert point.search_kl is not None
        assert point.predicted_kl is not None
    on_front = sorted((p for p in front.points if p.on_front), key=lambda p: p.weight_bytes)
    assert [p.kl for p in on_front] == sorted((p.kl for p in on_front), reverse=True)
    assert front.reference_perplexity is not None


def test_the_pinned_document(done):
    store, job, _ = done
    document = load_front(store, find_job(store, job)).to_json()
    assert list(document) == ["job", "model", "points"]
    assert set(document["points"][0]) == {
        "id", "average_bits", "weight_bytes", "kl", "kl_low", "kl_high", "perplexity",
        "search_kl", "predicted_kl", "control", "on_front", "map_hash",
    }  # fmt: skip
    json.dumps(document, allow_nan=False)


def test_bytes_and_bits_count_everything(done):
    """Uniform 4 bits in groups of 32 over rows of 64 and 96: 4.5 bits; the rest in bf16."""
    store, job, plan = done
    [uniform] = [c for c in candidates_of(store, job) if c.origin == "uniform int4-g32"]
    assert uniform.average_bits == 4.5
    outer = sum(u.numel for u in plan.layout.units if u.layer is None) + plan.layout.other_numel
    assert uniform.weight_bytes == plan.quantizable_numel * 4.5 / 8 + 2 * outer


def test_solutions_keep_their_budgets_and_carry_certificates(done):
    store, job, _ = done
    solved = [c for c in candidates_of(store, job) if c.certificate]
    assert solved
    for candidate in solved:
        assert candidate.weight_bytes <= candidate.certificate["budget"]
        assert 0 <= candidate.certificate["gap"] < 1e-6


def test_asking_again_measures_nothing(done):
    store, job, plan = done
    CountingPool.methods.clear()
    assert run_search(plan, store, CountingPool, Silent()) == job
    assert CountingPool.methods == []
    update_job(store, job, state="running")  # even if it hadn't known that it was done
    run_search(plan, store, CountingPool, Silent())
    assert CountingPool.methods == ["prepare"]


def test_another_question_reuses_what_was_measured(done):
    """A second job with one more budget measures only the maps that are new."""
    store, job, plan = done
    more = make_plan(plan.config.model_copy(update={"budgets": (2.5, 3.1, 4.5, 6.0, 8.5)}))
    before = _measured(store)
    CountingPool.methods.clear()
    other = run_search(more, store, CountingPool, Silent())
    assert other != job
    assert "estimate" not in CountingPool.methods
    assert CountingPool.methods.count("measure") == _measured(store) - before > 0
    assert find_job(store, None).id == other
    assert run_search(plan, store, CountingPool, Silent()) == job
    assert find_job(store, None).id == job  # asked for again, it is the latest


def test_results_do_not_depend_on_the_pool(done, tiny_folders, store, tmp_path):
    from workers.ray_pool import Needs, RayPool

    first_store, job, plan = done
    again = run_search(plan, store, lambda spec: RayPool(spec, needs=Needs(2)), Silent(),
                       os.environ["BITFRONT_CACHE"])  # fmt: skip
    first, second = (load_front(s, find_job(s, n)).points
                     for s, n in ((first_store, job), (store, again)))  # fmt: skip
    assert [p.map_hash for p in first] == [p.map_hash for p in second]
    assert [p.kl for p in first] == pytest.approx([p.kl for p in second], rel=1e-4, abs=1e-7)


def test_a_candidate_with_nan_is_reported_and_the_rest_goes_on(tiny_folders, store):
    class Poisoned(InProcessPool):
        def next(self) -> Outcome:
            outcome = super().next()
            arguments = outcome.task.arguments
            schemes = set(arguments.get("schemes") or ())
            if outcome.task.method == "measure" and "int2-g32" in schemes:
                return Outcome(outcome.task, error=MeasurementError("NaN or infinity"))
            return outcome

    plan = make_plan(small_config(tiny_folders("llama")))
    job = run_search(plan, store, Poisoned, Silent())
    failed = [c for c in candidates_of(store, job) if c.failure]
    assert failed
    assert all("int2-g32" in c.schemes for c in failed)
    front = load_front(store, find_job(store, job))
    assert front.points
    assert {p.id for p in front.points}.isdisjoint(c.point for c in failed)
    assert sum("NaN or infinity" in finding for finding in front.findings) == len(failed)


def test_nan_everywhere_ends_the_job_with_one_line(tiny_folders, store):
    class AllPoisoned(InProcessPool):
        def next(self) -> Outcome:
            outcome = super().next()
            if outcome.task.method == "measure" and outcome.task.arguments["schemes"]:
                return Outcome(outcome.task, error=MeasurementError("NaN or infinity"))
            return outcome

    plan = make_plan(small_config(tiny_folders("llama")))
    with pytest.raises(MeasurementError, match="no candidate could be measured: NaN"):
        run_search(plan, store, AllPoisoned, Silent())
    assert find_job(store, None).state == "failed"


def test_a_table_with_nan_is_refused(tiny_folders, store):
    """A unit of unknown loss must not look like one that costs nothing."""

    class NoGradient(InProcessPool):
        def next(self) -> Outcome:
            outcome = super().next()
            if outcome.task.method == "estimate":
                outcome.value[0].sums[3, 1] = np.nan
            return outcome

    plan = make_plan(small_config(tiny_folders("llama")))
    with pytest.raises(MeasurementError, match="no finite score for model.layers.0.mlp"):
        run_search(plan, store, NoGradient, Silent())


def test_an_open_embedding_and_head_are_scored_by_both_estimators(tiny_folders, store):
    menu = {"schemes": ["int4-g32", "int8-g32"], "pinned": {}}
    for family in ("llama", "qwen3"):
        plan = make_plan(small_config(tiny_folders(family), menu=menu))
        assert plan.open_units.all()
        job = run_search(plan, store, InProcessPool, Silent())
        with store.session() as session:
            shares = session.query(SensitivityShare).all()
        outer = [i for i, unit in enumerate(plan.layout.units) if unit.layer is None]
        totals = {name: np.zeros((len(plan.choices), 2)) for name in plan.config.estimators}
        for share in shares:
            if share.provenance["weights_hash"] == plan.checkpoint.weights_hash:
                totals[share.estimator] += np.array(share.sums, dtype=float)
        assert all((table[outer] > 0).all() for table in totals.values())
        assert load_front(store, find_job(store, job)).points


def test_a_failure_is_recorded_and_what_was_measured_stays(tiny_folders, store):
    class FullDisk(InProcessPool):
        def next(self) -> Outcome:
            outcome = super().next()
            if _measured(store) >= 5:
                return Outcome(outcome.task, error=BankError("can't write the bank: disk full"))
            return outcome

    plan = make_plan(small_config(tiny_folders("llama")))
    with pytest.raises(BankError):
        run_search(plan, store, FullDisk, Silent())
    job = find_job(store, None)
    assert (job.state, job.error) == ("failed", "can't write the bank: disk full")
    assert _measured(store) == 5
    CountingPool.methods.clear()
    run_search(plan, store, CountingPool, Silent())
    assert find_job(store, None).state == "done"
    assert CountingPool.methods.count("measure") == _measured(store) - 5


def test_what_a_user_interrupts_is_not_running(tiny_folders, store):
    """And goes on where the same is asked again; other budgets are told by the whole model's bytes."""

    class Impatient(InProcessPool):
        def next(self) -> Outcome:
            if _measured(store) >= 5:
                raise KeyboardInterrupt
            return super().next()

    plan = make_plan(small_config(tiny_folders("llama")))
    with pytest.raises(KeyboardInterrupt):
        run_search(plan, store, Impatient, Silent())
    assert find_job(store, None).state == "cancelled"
    run_search(plan, store, InProcessPool, Silent())
    job = find_job(store, None)
    assert job.state == "done"
    least = min(p.weight_bytes for p in load_front(store, job).points)
    assert solve_again(store, job, weight_bytes=[least])["solutions"][0]["weight_bytes"] == least
    with pytest.raises(InfeasibleBudgetError, match=f"at most {least - 1:,}: .* is {least:,};"):
        solve_again(store, job, weight_bytes=[least - 1])


KILLED = """
import sys
from bitfront.cli import main
sys.argv = ["bitfront", "search", *sys.argv[1:]]
main()
"""


def test_a_killed_driver_goes_on_from_where_it_was(tiny_folders, tmp_path):
    """kill -9 in mid-search, start again: only what is missing is measured."""
    url = f"sqlite:///{tmp_path}/s.sqlite"
    file = tmp_path / "job.yaml"
    file.write_text(
        "menu: int2-g32,int3-g32,int4-g32,int6-g32,int8-g32\ndtype: float32\n"
        "refinement: {measurements: 0}\ntexts:\n"
        + "".join(
            f"  {role}: {{source: python-docs, chunks: {n}, length: 64}}\n"
            for role, n in (("calibration", 2), ("search", 12), ("heldout", 12))
        )
    )
    folder = str(tiny_folders("llama"))
    command = [sys.executable, "-c", KILLED, folder, "-c", str(file), "--store", url,
               "--address", "none"]  # fmt: skip
    store = Store(url).open()
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while _measured(store) < 40 and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    kept = _measured(store)
    assert kept >= 40
    assert find_job(store, None).state == "running"  # it was killed before its end
    CountingPool.methods.clear()
    job = run_search(make_plan(load_config(folder, file, {})), store, CountingPool, Silent())
    assert find_job(store, None).id == job
    assert len(load_front(store, find_job(store, job)).points) >= 8
    assert CountingPool.methods.count("measure") == _measured(store) - kept
    assert "estimate" not in CountingPool.methods  # sensitivities were in the store, too


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"menu": "int4-g46"}, UnknownNameError, r"menu or format 'int4-g46'; nearest: .*int4-g64"),
        ({"menu": "int4-g32/int9"}, UnknownNameError, "unknown activation format"),
        ({"estimators": ["fischer"]}, UnknownNameError, "nearest: fisher"),
        ({"quantizer": "gptx"}, UnknownNameError, "nearest: gptq"),
        ({"budgets": [1.0]}, InfeasibleBudgetError, r"the smallest has .* \(2.5 bits on average"),
        ({"budgets_bytes": [1000]}, InfeasibleBudgetError, "no map fits into 1,000 weight bytes"),
        ({"dtype": "float17"}, MeasurementError, "unknown arithmetic type"),
        ({"texts.search.chunks": 0}, BitfrontError, r"texts.search.chunks: .* \(got 0\)"),
        ({"nonsense": 1}, BitfrontError, "nonsense: Extra inputs are not permitted"),
        ({"texts.search.source": "/absent"}, BitfrontError, "can't read the text '/absent'"),
        ({"texts.search.chunks": 10**6}, BitfrontError, "is too short"),
        ({"menu": "absent.yaml"}, BitfrontError, "can't read 'absent.yaml'"),
        ({"menu": "int4-g32"}, BitfrontError, "leaves nothing to decide"),
        (
            {"menu.pinned": {"embeding": "bf16"}, "menu.schemes": ["int4-g32", "int8-g32"]},
            BitfrontError,
            "pins 'embeding', which is no kind of unit",
        ),
        ({"budgets": [float("nan")]}, BitfrontError, "budgets.0"),
        ({"texts.heldout.chunks": 1}, BitfrontError, "texts.heldout.chunks"),
    ],
)
def test_bad_input_is_one_line(tiny_folders, more, error, words):
    with pytest.raises(error, match=words) as caught:
        make_plan(small_config(tiny_folders("llama"), **more))
    assert "\n" not in str(caught.value)


def test_the_smallest_budget_that_is_possible_is_possible(tiny_folders):
    plan = make_plan(small_config(tiny_folders("llama"), budgets=[2.5]))
    problem = plan.problem(np.ones(plan.bytes_table.shape))
    limit = plan.budgets[0] - plan.other_bytes
    assert plan.average_bits(solve(problem, {"weight_bytes": limit}).choice) == 2.5
    with pytest.raises(InfeasibleBudgetError):
        solve(problem, {"weight_bytes": limit - 1})


@pytest.mark.parametrize("transform", ["awq", "smoothquant"])
def test_a_transformed_job_is_a_job_of_its_own(done, transform, tmp_path):
    """It measures the folded model against itself, which is the original up to rounding."""
    store, job, plain = done
    folded = make_plan(
        plain.config.model_copy(update={"transform": transform, "quantizer": "gptq"})
    )
    same_but_for_it = make_plan(folded.config.model_copy(update={"transform": None}))
    assert folded.key != same_but_for_it.key
    assert folded.statistics != same_but_for_it.statistics
    assert folded.layout == plain.layout
    number = run_search(folded, store, InProcessPool, Silent())
    front, before = (load_front(store, find_job(store, n)) for n in (number, job))
    assert front.points
    assert front.reference_perplexity == pytest.approx(before.reference_perplexity, rel=1e-4)
    assert front.job.facts["transform"].startswith(transform)
    point = front.points[0].id
    (written,) = export_point(
        store, front, point, ["safetensors"], tmp_path / "export", force=False
    )
    assert written["reloaded_kl"] == pytest.approx(written["measured_kl"], rel=0.01)
    exported = json.loads((tmp_path / "export" / "precision_map.json").read_text())
    assert exported["provenance"]["transform"] == front.job.facts["transform"]


def test_without_a_transform_keys_are_what_they_were(done):
    """The field came later: it must not orphan what stores hold."""
    _, _, plan = done
    new = dict.fromkeys(
        ("transform", "imatrix", "bank", "refinement", "interactions", "serving"), True
    )
    new_in_menu = {"forbidden", "most_formats", "left_alone", "cache"}
    config = plan.config.model_dump(mode="json", exclude={**new, "menu": new_in_menu})
    named = {"model", "revision", "texts", "dtype"}
    old = json.dumps({k: v for k, v in config.items() if k not in named}, separators=(",", ":"))
    texts = [f"{role}:{text.hash}" for role, text in sorted(plan.texts.items())]
    assert plan.key == key_of(plan.checkpoint.weights_hash, old, plan.dtype, *texts)


def test_transforms_are_tuned_to_the_middle_format(tiny_folders):
    plan = make_plan(small_config(tiny_folders("llama"), transform="awq"))
    assert plan.folding.format == "int4-g32"  # of int2, int4, int8; the pinned bf16 isn't one
    with pytest.raises(UnknownNameError, match="unknown transform 'awk'; nearest: awq"):
        make_plan(small_config(tiny_folders("llama"), transform="awk"))


def test_queries_answer_by_constraint(done):
    store, job, _ = done
    front = load_front(store, find_job(store, job))
    smallest = min(front.points, key=lambda p: p.weight_bytes)
    point, _ = best_point(front, Constraints(weight_bytes=smallest.weight_bytes), size)
    assert point == smallest
    best = min(front.points, key=lambda p: (p.kl, p.weight_bytes))
    assert best_point(front, Constraints(), size)[0] == best
    loose = max(p.kl for p in front.points)
    assert best_point(front, Constraints(kl=loose), size)[0] == smallest
    nothing, why = best_point(front, Constraints(memory_bytes=100), lambda p: size(p) + 50)
    assert nothing is None
    assert f"the smallest is {smallest.weight_bytes + 50:,.6g}" in str(why)


def _measured(store) -> int:
    return len(_stamps(store))


def _stamps(store):
    with store.session() as session:
        return {m.key: m.measured_at for m in session.query(Measurement)}


def test_packed_banks_measure_the_same(done, tiny_folders):
    """Kernels add up in another order; formats without one are multiplied by the reference."""
    store, job, plain = done
    packed = make_plan(small_config(tiny_folders("llama"), bank="packed"))
    assert packed.packed
    assert not plain.packed
    assert packed.key != plain.key
    number = run_search(packed, store, InProcessPool, Silent())
    values, bytes_ = (load_front(store, find_job(store, n)) for n in (job, number))
    found = {p.map_hash: p.kl for p in bytes_.points}
    shared = [p for p in values.points if p.map_hash in found]
    assert len(shared) >= 3
    for point in shared:
        assert found[point.map_hash] == pytest.approx(point.kl, rel=1e-3)


def test_a_job_calibrates_quantizers_and_formats_that_need_it(store, tiny_folders):
    """GPTQ, Fisher-weighted tables and a mixture in one menu, on packed experts as well."""
    menu = "int3-g32,squeezellm3,mixllm-int4-g64-asym@20%,int8-channel"
    for family in ("llama", "gpt_oss"):
        config = small_config(tiny_folders(family), menu=menu, quantizer="gptq", random_controls=0)
        plan = make_plan(config)
        assert plan.quantizer.startswith("gptq(")
        assert plan.quantizer.endswith(f"@{plan.statistics[:16]}")
        front = load_front(store, find_job(store, run_search(plan, store, InProcessPool, Silent())))
        assert len([p for p in front.points if p.control == "uniform"]) >= 3


def test_an_imatrix_stands_in_for_calibration(store, tiny_folders, tmp_path):
    plan = make_plan(small_config(tiny_folders("llama")))
    ones = {
        site.parameter: torch.rand(site.shape[-1], generator=torch.Generator().manual_seed(0))
        for unit in plan.layout.units
        if unit.layer is not None
        for site in unit.stored
    }
    write_imatrix(tmp_path / "imatrix.gguf", ones, plan.layout, "llama", "test", 1, 8)
    config = small_config(
        tiny_folders("llama"), menu="int2-g32,int4-g32", quantizer="rtn-weighted",
        imatrix=str(tmp_path / "imatrix.gguf"),
    )  # fmt: skip
    imported = make_plan(config)
    calibrated = make_plan(config.model_copy(update={"imatrix": None}))
    assert imported.quantizer != calibrated.quantizer
    assert imported.key != calibrated.key
    job = run_search(imported, store, InProcessPool, Silent())
    assert load_front(store, find_job(store, job)).points
    with pytest.raises(BitfrontError, match="leave one of them out"):
        make_plan(config.model_copy(update={"transform": "awq"}))


def test_a_menu_larger_than_the_memory_is_kept_packed(tiny_folders, monkeypatch):
    monkeypatch.setattr("bitfront.plan.memory_bytes", lambda: 10_000)
    assert make_plan(small_config(tiny_folders("llama"))).packed
    assert not make_plan(small_config(tiny_folders("llama"), bank="values")).packed
