"""Searches for an engine on this machine: profiles kept, limits held, predictions checked."""

import json
import os
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from bitfront import latency
from bitfront.answering import NothingFitsError
from bitfront.budgets import working_bytes
from bitfront.config import ConfigError, ServingConfig
from bitfront.console import PREDICTED, front_table
from bitfront.documents import front_document
from bitfront.exporting import export_point
from bitfront.fronts import Constraints, best_point, load_front
from bitfront.pipeline import run_search, spec_of
from bitfront.plan import make_plan
from bitfront.profiling import profile
from bitfront.progress import Silent
from bitfront.querying import run_query
from bitfront.resolving import NoTablesError
from bitfront.service import Service
from bitfront.serving import measured_times, subject_of, timed, workload_of
from bitfront.sizes import parse_joules, raised
from bitfront.spending import joules_of_runs
from cost_models.geometry import geometry_of
from cost_models.memory import activation_bytes, footprint, kv_cache_bytes
from engines import ENGINES
from engines.base import Run, Timing
from engines.llama_cpp import LlamaCpp
from quantization.checkpoints import load_config
from quantization.errors import WorkerDiedError
from quantization.formats.gguf import TYPES
from quantization.schemes import Scheme
from search.errors import InfeasibleBudgetError
from store.database import Store
from store.queries import candidates_of, find_job
from store.times import cell_times
from tests.bitfront.test_pipeline import CountingPool, size, small_config
from tests.commanding import run_command
from workers.pool import InProcessPool

SERVING = ServingConfig(engine="llama.cpp", threads=1, context=32, prompt=32)
MENU = {
    "schemes": ["gguf-q4_0", "gguf-q5_1", "gguf-q8_0", "bf16"],
    "pinned": {"embedding": "bf16", "head": "bf16"},
}


def config_of(folder, serving=SERVING, **more):
    """A small job for llama.cpp."""
    config = small_config(folder)
    data = {**config.model_dump(), "menu": MENU, "serving": serving.model_dump(), **more}
    return type(config).model_validate(data)


@pytest.fixture(scope="module")
def folder(tiny_folders):
    return tiny_folders("llama")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(f"sqlite:///{tmp_path_factory.mktemp('serving')}/s.sqlite").open()


@pytest.fixture(scope="module")
def done(folder, store):
    plan = make_plan(config_of(folder, budgets=(4.6, 6.0)))
    return plan, run_search(plan, store, InProcessPool, Silent())


def subject(plan):
    return subject_of(plan.config.serving, plan.engine, plan.layout, plan.menu, plan.offered)


def test_an_engine_that_fuses_nothing_decides_each_tensor(done):
    plan, _ = done
    assert int(plan.open_units.sum()) == 2 * 7
    assert plan.other_bytes == 4 * plan.layout.other_numel  # llama.cpp keeps norms in float32


def test_a_profile_times_nothing_twice(done, store):
    plan, _ = done
    CountingPool.methods.clear()
    known = profile(subject(plan), store, CountingPool(spec_of(plan, None)), Silent())
    assert CountingPool.methods == []
    assert known.failed == []
    rows = cell_times(store, [subject(plan).cell_key(c) for c in subject(plan).cells]).values()
    assert {(r.rows, r.columns, r.kernel, r.batch) for r in rows} == {
        (*c.shape, c.kernel, c.batch) for c in subject(plan).cells
    }


def test_finalists_are_run_and_compared_with_the_prediction(done, store):
    _, job = done
    front = load_front(store, find_job(store, job))
    for point in front.points:
        found = front.job.facts["times"]["maps"][point.map_hash]
        for phase in ("prefill", "decode"):
            assert found["predicted"][phase] > 0
            assert found["measured"][phase] > 0
            assert latency.seconds(front.job, point.map_hash, phase) == found["measured"][phase]
    assert any("was off from what they took" in line for line in front.findings)
    assert set(front.to_json()["times"]["points"]) == {point.id for point in front.points}
    json.dumps(front.to_json(), allow_nan=False)
    assert {point["times"] for point in front_document(front)["points"]} == {"measured"}


def test_a_query_limits_latency(done, store):
    _, job = done
    front = load_front(store, find_job(store, job))
    took = sorted(latency.seconds(front.job, p.map_hash, "decode") for p in front.points)
    middle = took[len(took) // 2]
    best, _ = best_point(front, Constraints(decode_s=middle), size)
    assert latency.seconds(front.job, best.map_hash, "decode") <= middle
    none, why = best_point(front, Constraints(decode_s=took[0] / 2), size)
    assert none is None
    assert "decode_s <= " in why


class Clockwork(LlamaCpp):
    """llama.cpp with a clock of its own: a nanosecond a byte, and a microsecond beside.

    On a model as tiny as this one, real times are all noise.
    """

    def kernel_version(self):
        return "clockwork"

    def time_cells(self, cells, threads, usual_s):
        seconds = [1e-9 * cell.batch * _nbytes(cell.kernel, cell.shape) for cell in cells]
        return [Timing(s, 0.0) for s in seconds]

    def time_map(self, checkpoint, layout, schemes, reference, exercise):
        def run(maps):
            nbytes = sum(
                _nbytes(self.kernel(scheme, site.shape), site.shape)
                for unit, scheme in zip(layout.units, maps, strict=True)
                for site in unit.sites
                if unit.kind != "embedding"
            )
            return Run((1e-6 + 32e-9 * nbytes,) * 3, (1e-6 + 1e-9 * nbytes,) * 9)

        return run(schemes), run(reference)


def _nbytes(kernel, shape):
    return shape[0] * TYPES[kernel].row_bytes(shape[1])


class Pinned(Clockwork):
    """Notes on how many cores it is timed."""

    cores: ClassVar[set[int]] = set()

    def time_cells(self, cells, threads, usual_s):
        self.cores.add(len(os.sched_getaffinity(0)))
        return super().time_cells(cells, threads, usual_s)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no such call on this system")
def test_products_are_timed_on_as_many_cores_as_threads(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES._entries, "llama.cpp", f"{__name__}:Pinned")
    before = os.sched_getaffinity(0)
    plan = make_plan(config_of(folder, SERVING.model_copy(update={"threads": 1})))
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    timed(plan, store, InProcessPool(spec_of(plan, None)), Silent())
    assert Pinned.cores == {1}
    assert os.sched_getaffinity(0) == before


def test_limits_hold_for_every_map_that_is_proposed(folder, tmp_path, monkeypatch):
    """A limit in the middle between the fastest and the slowest map binds, and all maps keep it."""
    monkeypatch.setitem(ENGINES._entries, "llama.cpp", f"{__name__}:Clockwork")
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    plan = make_plan(config_of(folder))
    times = timed(plan, store, InProcessPool(spec_of(plan, None)), Silent())
    open_rows = np.where(plan.offered, times.tables_s["decode"], np.nan)
    fastest, slowest = (float(f(open_rows, axis=1).sum()) for f in (np.nanmin, np.nanmax))
    limit = times.overhead_s["decode"] + (fastest + slowest) / 2
    limited = make_plan(config_of(folder, SERVING.model_copy(update={"max_decode_s": limit})))
    job = run_search(limited, store, InProcessPool, Silent())
    solved = [c for c in candidates_of(store, job) if c.certificate]
    assert len(solved) > 2
    assert max(c.weight_bytes for c in solved) < limited.budgets[-1]  # bytes alone would allow more
    found = find_job(store, job).facts["times"]["maps"]
    for times in found.values():
        assert times["predicted"]["decode"] <= limit
        assert times["measured"]["decode"] == pytest.approx(times["predicted"]["decode"], rel=0.01)


class Watched(Clockwork):
    """With a counter of energy: 10 W while a prompt is read, 5 W while tokens are made."""

    def counter(self):
        return object(), "a test's"

    def time_map(self, *arguments):
        own, beside = super().time_map(*arguments)
        spent = {"prefill_j": 10 * own.prefill_s[0], "decode_j": 5 * own.decode_s[0]}
        return replace(own, **spent), beside


def test_limits_on_energy_hold_where_a_counter_watches(folder, tmp_path, monkeypatch):
    """In the search, when it is solved again, and in queries."""
    monkeypatch.setitem(ENGINES._entries, "llama.cpp", f"{__name__}:Watched")
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    plan = make_plan(config_of(folder))
    times = timed(plan, store, InProcessPool(spec_of(plan, None)), Silent())
    joules = times.joules
    some = plan.offered.argmax(axis=1)
    assert joules.predict(some, "decode") == pytest.approx(5 * times.predict(some, "decode"))
    assert joules.predict(some, "prefill") == pytest.approx(10 * times.predict(some, "prefill"))
    known = np.where(plan.offered, joules.table("decode"), np.nan)
    least, most = (float(f(known, axis=1).sum()) for f in (np.nanmin, np.nanmax))
    limit = joules.fixed("decode") + (least + most) / 2
    serving = SERVING.model_copy(update={"max_decode_j": limit})
    job = run_search(make_plan(config_of(folder, serving)), store, InProcessPool, Silent())
    solved = [c for c in candidates_of(store, job) if c.certificate]
    assert len(solved) > 2
    assert max(c.weight_bytes for c in solved) < plan.budgets[-1]  # bytes alone would allow more
    front = load_front(store, find_job(store, job))
    for point in front.points:
        spent = latency.joules(front.job, point.map_hash, "decode")
        assert spent <= limit * 1.001
        assert spent == pytest.approx(5 * latency.seconds(front.job, point.map_hash, "decode"))
    assert any("drew 10 W in prefill, 5 W in decode" in line for line in front.findings)
    assert all(p["decode_j"] <= limit * 1.001 for p in front_document(front)["points"])
    columns = {str(c.header): list(c.cells) for c in front_table(front_document(front)).columns}
    assert list(columns)[-5:] == ["a token", "prompt", "energy a token", "of a prompt", "what"]
    assert all(cell.endswith("J") and "~" not in cell for cell in columns["energy a token"])
    again = Service(store).solve(job, (), [plan.budgets[-1]])["solutions"][0]
    assert again["weight_bytes"] < plan.budgets[-1]  # the job's own limit holds
    assert again["decode_j"] <= limit * 1.001
    with pytest.raises(InfeasibleBudgetError, match=r"decode_j of at most 0.001 mJ: the least is"):
        Service(store).solve(job, (), [plan.budgets[-1]], {"decode_j": 1e-6})
    low = min(latency.joules(front.job, p.map_hash, "decode") for p in front.points)
    best, _ = best_point(front, Constraints(decode_j=low), size)
    assert latency.joules(front.job, best.map_hash, "decode") == low
    assert Service(store).query({"decode_j": low}, job=job)["decode_j"] == low
    with pytest.raises(NothingFitsError, match=r"decode_j <= .*the smallest is"):
        Service(store).query({"decode_j": low / 2}, job=job)


def test_maps_that_nobody_watched_are_run_again_where_energy_is_limited(
    folder, tmp_path, monkeypatch
):
    """A counter that was allowed to be read later counts from then on."""
    monkeypatch.setitem(ENGINES._entries, "llama.cpp", f"{__name__}:Clockwork")
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    plan = make_plan(config_of(folder))
    before = timed(plan, store, InProcessPool(spec_of(plan, None)), Silent())
    assert isinstance(before.joules, str)
    monkeypatch.setitem(ENGINES._entries, "llama.cpp", f"{__name__}:Watched")
    limited = make_plan(config_of(folder, SERVING.model_copy(update={"max_decode_j": 1.0})))
    after = timed(limited, store, InProcessPool(spec_of(limited, None)), Silent())
    assert after.joules.fixed("decode") == pytest.approx(5 * after.fixed("decode"))


def test_a_counter_that_stands_still_watches_nothing(done, store):
    plan, _ = done
    known = profile(subject(plan), store, InProcessPool(spec_of(plan, None)), Silent())
    runs = known.joules()
    still = {phase: [(0.0, seconds) for _, seconds in of] for phase, of in runs.items()}
    assert joules_of_runs(measured_times(known), still) is None


def test_limits_on_energy_of_a_catalogued_device_are_rough_and_say_so(folder, tmp_path):
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    there = {"device": "rtx-4090", "threads": None}
    plan = make_plan(config_of(folder, SERVING.model_copy(update=there)))
    times = timed(plan, store, InProcessPool(spec_of(plan, None)), Silent())
    known = np.where(plan.offered, times.joules.table("decode"), np.nan)
    middle = float((np.nanmin(known, axis=1).sum() + np.nanmax(known, axis=1).sum()) / 2)
    limit = times.joules.fixed("decode") + middle
    serving = SERVING.model_copy(update={**there, "max_decode_j": limit})
    job = run_search(make_plan(config_of(folder, serving)), store, InProcessPool, Silent())
    front = load_front(store, find_job(store, job))
    spent = [latency.joules(front.job, p.map_hash, "decode") for p in front.points]
    assert max(spent) <= limit * (1 + 1e-6)
    assert any("derived from the power limit of 450 W" in line for line in front.findings)
    serving = SERVING.model_copy(update={"device": "m3-max", "threads": None, "max_decode_j": 1.0})
    with pytest.raises(ConfigError, match=r"energy can't be limited: .*'m3-max' has no tdp_w"):
        run_search(make_plan(config_of(folder, serving)), store, InProcessPool, Silent())
    serving = SERVING.model_copy(update={**there, "max_decode_j": 1e-12})
    with pytest.raises(InfeasibleBudgetError, match=r"no map takes at most 1e-12 J in decode"):
        run_search(make_plan(config_of(folder, serving)), store, InProcessPool, Silent())


def test_a_job_without_a_counter_knows_no_energy(done, store, monkeypatch):
    _, job = done
    facts = find_job(store, job).facts["times"]["joules"]
    if facts.get("source"):
        pytest.skip("this machine has a counter")
    with pytest.raises(NothingFitsError, match="knows no energy"):
        Service(store).query({"decode_j": 1.0}, job=job)
    with pytest.raises(NoTablesError, match="knows no joules"):
        Service(store).solve(job, [5.0], (), {"decode_j": 1.0})


def test_the_least_that_is_told_can_be_given():
    for value in (0.16003, 1.0, 0.99999, 12345.6, 3e-7):
        assert value <= float(f"{raised(value):.4g}") <= value * 1.001


def test_megajoules_are_no_millijoules():
    assert [parse_joules(text) for text in ("40mJ", "40mj", "1.5J", "2kJ", "1MJ")] == [
        0.04, 0.04, 1.5, 2000.0, 1e6,
    ]  # fmt: skip


def test_limits_on_energy_want_a_counter(folder, monkeypatch):
    monkeypatch.setattr(LlamaCpp, "counter", lambda _: (None, "nobody counts"))
    serving = SERVING.model_copy(update={"max_decode_j": 1.0})
    with pytest.raises(ConfigError, match="on this machine: nobody counts; name a device"):
        make_plan(config_of(folder, serving))


def test_limits_that_nothing_keeps_name_the_fastest(folder, store):
    serving = SERVING.model_copy(update={"max_decode_s": 1e-9})
    with pytest.raises(InfeasibleBudgetError, match=r"the fastest takes .* raise the limit"):
        run_search(make_plan(config_of(folder, serving)), store, InProcessPool, Silent())


def test_a_limit_on_memory_leaves_the_rest_to_the_weights(folder, done):
    """Weights, cache and activations together, to the byte."""
    plan, _ = done
    workload_bytes = kv_cache_bytes(plan.layout, _workload()) + activation_bytes(
        plan.layout, geometry_of(load_config(plan.checkpoint), plan.layout), _workload()
    )
    weights = plan.budgets[0]
    serving = SERVING.model_copy(update={"max_memory_bytes": weights + workload_bytes})
    assert max(make_plan(config_of(folder, serving)).budgets) == weights
    serving = SERVING.model_copy(update={"max_memory_bytes": workload_bytes})
    with pytest.raises(InfeasibleBudgetError, match="bytes of memory: the smallest has"):
        make_plan(config_of(folder, serving))


def test_no_map_breaks_a_limit_on_memory_and_a_query_counts_alike(folder, store, done, capsys):
    """Controls neither; and what the job was limited to, a query of it finds."""
    plan, _ = done
    limit = plan.budgets[0] + kv_cache_bytes(plan.layout, _workload()) + working_bytes(plan)
    serving = SERVING.model_copy(update={"max_memory_bytes": limit})
    job = run_search(make_plan(config_of(folder, serving)), store, InProcessPool, Silent())
    found = candidates_of(store, job)
    assert found
    assert all(candidate.weight_bytes <= plan.budgets[0] for candidate in found)
    limits = dict.fromkeys(("weight_bytes", "average_bits", "kl", "decode_s", "prefill_s"))
    run_query(Service(store), {**limits, "memory_bytes": limit}, of(job), as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["memory_bytes"] <= limit
    assert answer["workload"] == {"batch": SERVING.batch, "context": SERVING.context}
    assert answer["decode_s"] > 0


def test_memory_is_each_devices_where_several_share_the_layers(folder, store, done, capsys):
    """A map fits into each of two devices with half of its matrices and half of the cache."""
    plan, _ = done
    whole = plan.budgets[0] + kv_cache_bytes(plan.layout, _workload())
    limit = whole // 2 + plan.other_bytes + working_bytes(plan) + 64
    two = ServingConfig(context=32, prompt=32, tensor_parallel=2, max_memory_bytes=limit)
    config = config_of(folder, two, menu={**MENU, "schemes": ["int4-g32", "int8-g32", "bf16"]})
    sharded = make_plan(config)
    job = run_search(sharded, store, InProcessPool, Silent())
    geometry = geometry_of(load_config(sharded.checkpoint), sharded.layout)
    candidates = candidates_of(store, job)
    assert candidates
    for candidate in candidates:
        schemes = [Scheme.parse(name) for name in candidate.schemes]
        held = footprint(sharded.layout, geometry, schemes, workload_of(two))
        assert held.total - held.workspace <= limit
    sizes = [candidate.weight_bytes for candidate in candidates]
    assert max(sizes) > limit  # what one device alone couldn't hold
    limits = dict.fromkeys(("weight_bytes", "average_bits", "kl", "decode_s", "prefill_s"))
    run_query(Service(store), {**limits, "memory_bytes": limit}, of(job), as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["memory_bytes"] <= limit
    assert answer["workload"]["tensor_parallel"] == 2


def test_fields_that_came_later_tell_no_job_apart(folder):
    """A store's jobs with an engine keep their keys; other answers are other jobs."""
    usual = ServingConfig(engine="vllm")
    dump = json.loads(usual.model_dump_json(exclude=usual.silent))
    later = {"generated", "tensor_parallel", "max_decode_j", "max_prefill_j"}
    assert set(dump) & later == set()
    config = config_of(folder, usual, menu={**MENU, "schemes": ["int8-g32-bf16", "bf16"]})
    with pytest.raises(ConfigError, match="menu leaves nothing to decide"):  # no kernel so narrow
        make_plan(config)
    assert ServingConfig().silent is True
    longer = ServingConfig(generated=7)
    assert "generated" in json.loads(longer.model_dump_json(exclude=longer.silent))


def test_a_request_is_a_prompt_and_its_answer(done, store, capsys):
    _, job = done
    limits = dict.fromkeys(
        ("weight_bytes", "average_bits", "kl", "memory_bytes", "decode_s", "prefill_s")
    )
    run_query(Service(store), limits, of(job), as_json=False)
    assert f"a request of {SERVING.prompt} and 128 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["measured", "predicted"])
def test_a_query_marks_seconds_that_nobody_measured(done, store, capsys, kind):
    class Known(Service):
        def query(self, *given, **more):
            found = super().query(*given, **more)
            return {**found, "point": {**found["point"], "times": kind}}

    _, job = done
    limits = dict.fromkeys(
        ("weight_bytes", "average_bits", "kl", "memory_bytes", "decode_s", "prefill_s")
    )
    run_query(Known(store), limits, of(job), as_json=False)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "latency" in line or "a request" in line]
    assert len(lines) == 3
    assert {"~" in line for line in lines} == {PREDICTED in printed} == {kind == "predicted"}


def of(job):
    """A question about one job, at its own workload."""
    return {"job": job, "model": None, "batch": None, "context": None}


def _workload():
    return workload_of(SERVING)


class Broken(LlamaCpp):
    """llama.cpp without a kernel for q5_1."""

    def kernel(self, scheme, shape):
        found = super().kernel(scheme, shape)
        return "q9" if found == "q5_1" else found


def test_a_kernel_that_cant_run_is_marked_and_left_out(done, tmp_path, monkeypatch):
    plan, _ = done
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    monkeypatch.setitem(ENGINES._entries, "llama.cpp", f"{__name__}:Broken")
    found = subject_of(plan.config.serving, Broken(), plan.layout, plan.menu, plan.offered)
    known = profile(found, store, InProcessPool(spec_of(plan, None)), Silent())
    assert {row.kernel for row in known.failed} == {"q9"}
    column = [scheme.name for scheme in plan.menu].index("gguf-q5_1")
    rows = plan.offered[:, column]
    assert np.isnan(known.table_s("decode")[rows, column]).all()
    assert np.isfinite(np.delete(known.table_s("decode"), column, axis=1)[rows]).all()
    limited = plan.config.serving.model_copy(update={"max_decode_s": 1.0})
    config = plan.config.model_copy(update={"serving": limited})
    problem = replace(plan, config=config, times=measured_times(known)).problem(
        np.ones(plan.offered.shape)
    )
    assert not problem.offered[rows, column].any()  # a time that nobody knows isn't free
    assert problem.offered[plan.offered].sum() == plan.offered.sum() - rows.sum()


class Crashing(InProcessPool):
    """Loses its worker to one kernel, every time."""

    def next(self):
        for cell in self._queue[0].arguments.get("cells", ()):
            if cell.kernel == "q5_1":
                self._queue.popleft()
                raise WorkerDiedError("a worker died 3 times in 'time_cells'")
        return super().next()


def test_a_kernel_that_crashes_is_left_out_and_tried_again_later(done, tmp_path):
    """The others are timed; the crash may have been the machine's, so it isn't kept."""
    plan, _ = done
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    known = profile(subject(plan), store, Crashing(spec_of(plan, None)), Silent())
    assert {row.kernel for row in known.failed} == {"q5_1"}
    kept = cell_times(store, [row.key for row in known.cells.values()])
    assert set(kept) == {row.key for row in known.cells.values() if row.kernel != "q5_1"}


def test_a_catalogued_device_is_analytical_and_says_so(folder, store):
    serving = SERVING.model_copy(update={"device": "rtx-4090", "threads": None})
    plan = make_plan(config_of(folder, serving, budgets=(6.0,)))
    job = run_search(plan, store, InProcessPool, Silent())
    front = load_front(store, find_job(store, job))
    assert any("Latency is analytical" in line for line in front.findings)
    for point in front.points:
        assert "measured" not in front.job.facts["times"]["maps"][point.map_hash]
    assert {point["times"] for point in front_document(front)["points"]} == {"predicted"}


def test_sequences_side_by_side_are_timed(folder, tmp_path):
    """By the engine itself: several take longer than one, and are other times in the store."""
    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    took = {}
    for batch in (1, 8):
        serving = SERVING.model_copy(update={"batch": batch})
        plan = make_plan(config_of(folder, serving))
        times = timed(plan, store, InProcessPool(spec_of(plan, None)), Silent())
        assert times.source == "measured"
        took[batch] = {
            phase: min(times.profile.measured_s(row, phase) for _, row in times.profile.maps)
            for phase in ("prefill", "decode")
        }
    assert took[8]["prefill"] > took[1]["prefill"]
    assert took[8]["decode"] > took[1]["decode"]


def test_what_it_found_is_exported_and_served(done, store, tmp_path):
    _, job = done
    front = load_front(store, find_job(store, job))
    point = next(p for p in front.points if not p.control)
    (written,) = export_point(store, front, point.id, ["gguf"], tmp_path / "out", force=False)
    assert written["weight_bytes"] == point.weight_bytes
    assert written["reloaded_kl"] == pytest.approx(written["measured_kl"], rel=0.05, abs=0.02)


def test_limits_on_seconds_want_an_engine(folder):
    serving = ServingConfig(max_decode_s=1.0)
    with pytest.raises(ConfigError, match="needs an engine"):
        make_plan(config_of(folder, serving))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["devices", "h100"], "unknown device 'h100'; nearest: "),
        (["profile", "MODEL", "--device", "h200"], "only this machine can be profiled, not 'h200'"),
        (["profile", "MODEL", "--engine", "lama.cpp"], "unknown engine 'lama.cpp'; nearest: llama"),
        (["profile", "MODEL", "--engine", "vllm"], "vllm can't be timed on this machine"),
        (
            ["search", "MODEL", "--target", "vllm", "--max-decode-latency", "8ms"],
            "vllm can't be timed on this machine; name a device",
        ),
        (
            ["search", "MODEL", "--target", "mlx", "--menu", "int4-g32,int8-g32,bf16"],
            "MLX has no kernel for int4-g32; it has int4-g32-bf16",
        ),
        (["search", "MODEL", "--max-decode-latency", "8"], "'8' is not a time; write 8ms"),
        (["search", "MODEL", "--max-decode-latency", "8ms"], "needs an engine"),
        (["search", "MODEL", "--max-decode-energy", "8"], "'8' is not an energy; write 40mJ"),
        (["search", "MODEL", "--max-prefill-energy", "8J"], "an energy limit needs an engine"),
        (
            ["search", "MODEL", "--engine", "llama.cpp", "--menu", "int4-g64,int8-g64"],
            "no kernel for int4-g64",
        ),
        (["search", "MODEL", "--engine", "llama.cpp", "--batch", "512"], "with at most 64 on"),
        (["search", "MODEL", "--device", "rtx-4090"], "mean nothing without an engine"),
        (
            ["search", "MODEL", "--engine", "llama.cpp", "--tensor-parallel", "2"],
            "tensor_parallel is 2",
        ),
    ],
)
def test_bad_input_is_one_line(folder, arguments, said):
    done = run_command([str(folder) if word == "MODEL" else word for word in arguments])
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
