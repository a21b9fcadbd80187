"""Jobs that choose formats of the KV cache beside those of the weights."""

import json
import subprocess

import numpy as np
import pytest

from bitfront import caching
from bitfront.answering import answer, footprint
from bitfront.applying import apply as apply_map
from bitfront.budgets import working_bytes
from bitfront.config import ConfigError, load_config
from bitfront.documents import detail_document, front_document
from bitfront.exporting import export_point
from bitfront.fronts import load_front
from bitfront.pipeline import run_search
from bitfront.plan import make_plan
from bitfront.progress import Silent
from bitfront.settling import settled
from cost_models import cache_bytes
from cost_models.memory import Workload
from quantization.errors import BitfrontError, ExportError
from quantization.formats import FORMATS
from quantization.precision_map import PrecisionMap
from quantization.schemes import Scheme
from search.errors import InfeasibleBudgetError
from store.database import Store
from store.queries import candidates_of, find_job
from tests.bitfront.test_pipeline import CountingPool, small_config
from workers.pool import InProcessPool

CACHE = {"menu.cache": ["bf16", "int8-channel", "int4-channel"], "menu": "int4-g32,int8-g32",
         "estimators": ["fisher"], "serving.context": 512, "serving.batch": 3}  # fmt: skip


def config_of(folder, **more):
    return small_config(folder, **{**CACHE, "menu": "int4-g32,int8-g32", **more})


@pytest.fixture(scope="module")
def done(tiny_folders, tmp_path_factory):
    """A finished job: store, front, plan."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('caches')}/s.sqlite").open()
    plan = make_plan(config_of(tiny_folders("llama")))
    job = run_search(plan, store, InProcessPool, Silent())
    return store, load_front(store, find_job(store, job)), plan


def test_keys_and_values_of_each_layer_are_units(done):
    _, front, plan = done
    names = [u.name for u in plan.layout.units if u.kind == "cache"]
    assert names == [f"model.layers.{i}.{kind}_cache" for i in range(2) for kind in "kv"]
    assert [u.kind for u in front.layout.units] == [u.kind for u in plan.layout.units]
    assert plan.described.units == plan.layout.weights


def test_bytes_are_weights_and_the_cache_at_the_workload(done):
    """2 heads of 16 numbers a token, for keys and for values, in two layers, three sequences."""
    store, front, plan = done
    rows = 3 * 512 * 2
    for point in front.points:
        schemes = front.candidates[point.id].schemes
        pairs = zip(plan.layout.units, schemes, strict=True)
        expected = sum(
            3 * FORMATS[name].nbytes((512 * 2, 16)) for unit, name in pairs if unit.kind == "cache"
        )
        assert point.cache_bytes == expected
        weights = sum(
            FORMATS[name].nbytes(site.shape)
            for unit, name in zip(plan.layout.units, schemes, strict=True)
            for site in unit.stored
        )
        assert point.weight_bytes == weights + plan.other_bytes
    exact = next(p for p in front.points if "KV bf16" in front.candidates[p.id].origin)
    assert exact.cache_bytes == 2 * 2 * rows * 16 * 2
    solved = [c for c in candidates_of(store, front.job.id) if c.certificate]
    assert solved
    assert all(c.weight_bytes <= c.certificate["budget"] for c in solved)


def test_the_search_mixes_what_it_is_offered(done):
    """Uniform controls of both kinds, and maps that give layers different caches."""
    _, front, plan = done
    origins = {front.candidates[p.id].origin for p in front.points if p.control == "uniform"}
    assert origins >= {
        "uniform int4-g32 + KV bf16", "uniform int8-g32 + KV bf16",
        "uniform int8-g32 + KV int4-channel",
    }  # fmt: skip
    caches = np.flatnonzero(plan.caches)
    mixed = [
        point
        for point in front.points
        if not point.control and len({front.candidates[point.id].schemes[u] for u in caches}) > 1
    ]
    assert mixed
    on_front = sorted((p for p in front.points if p.on_front), key=lambda p: p.size_bytes)
    assert [p.kl for p in on_front] == sorted((p.kl for p in on_front), reverse=True)


def test_another_context_is_counted_anew(done):
    _, front, plan = done
    point = min(front.points, key=lambda p: p.size_bytes)
    schemes = [Scheme(name) for name in front.candidates[point.id].schemes]
    own = footprint(front)
    assert own.cache_bytes(point) == point.cache_bytes
    other = footprint(front, batch=1, context=100)
    table = [
        cache_bytes.unit_bytes(unit, plan.layout, scheme, Workload(1, 100))
        for unit, scheme in zip(plan.layout.units, schemes, strict=True)
        if unit.kind == "cache"
    ]
    assert other.cache_bytes(point) == pytest.approx(sum(table), abs=len(table))
    assert other.memory_bytes(point) == point.weight_bytes + other.cache_bytes(point)


def test_a_query_by_memory_counts_each_points_own_cache(done):
    _, front, _ = done
    sizes = {p.id: footprint(front).memory_bytes(p) for p in front.points}
    limit = sorted(sizes.values())[len(sizes) // 2]
    found = answer(front, {"memory_bytes": limit})
    assert sizes[found.point.id] <= limit
    fitting = [p for p in front.points if sizes[p.id] <= limit]
    assert found.point.kl == min(p.kl for p in fitting)
    assert found.to_json()["kv_cache_bytes"] == found.point.cache_bytes


def test_documents_tell_the_cache_from_the_weights(done):
    _, front, plan = done
    for document in (front.to_json(), front_document(front)):
        for point in document["points"]:
            assert point["cache_bytes"] > 0
        json.dumps(document, allow_nan=False)
    detail = detail_document(front, None)
    assert detail["rows"][-2:] == ["k_cache", "v_cache"]
    bits = dict(zip([u["name"] for u in detail["units"]], detail["bits"], strict=True))
    columns = dict(zip(detail["menu"], bits["model.layers.0.k_cache"], strict=True))
    assert columns["bf16"] == 16
    assert columns["int4-channel"] == 4 + 16 / 16  # a float16 scale for each row of 16
    assert columns["int8-g32"] is None


def test_a_job_is_resumed_by_its_key(done, tiny_folders):
    store, front, plan = done
    CountingPool.methods = []
    again = make_plan(config_of(tiny_folders("llama")))
    assert again.key == plan.key
    assert run_search(again, store, CountingPool, Silent()) == front.job.id
    assert not CountingPool.methods
    without = make_plan(small_config(tiny_folders("llama")))
    assert without.key != plan.key
    # a menu without caches is a job as it was before there were any
    assert "cache" in without.config.menu.silent


def test_a_limit_on_memory_pays_for_both(tiny_folders):
    """The least memory fits only the smallest of both; what is left of a larger one is spent."""
    config = config_of(tiny_folders("llama"), **{"serving.max_memory_bytes": 1_400_000})
    plan = make_plan(config)
    problem = plan.problem(plan.bytes_table.astype(float))
    assert max(plan.budgets) <= 1_400_000 - working_bytes(plan)
    assert plan.other_bytes + problem.smallest("weight_bytes") <= min(plan.budgets)
    with pytest.raises(InfeasibleBudgetError, match="of weights and KV cache of 3 x 512"):
        make_plan(config_of(tiny_folders("llama"), **{"serving.max_memory_bytes": 100_000}))


def test_the_map_names_caches_and_is_applied_again(done, tmp_path, tiny_folders):
    store, front, _ = done
    point = next(p for p in front.points if p.control is None)
    [written] = export_point(store, front, point.id, ["map"], tmp_path / "map", force=False)
    found = PrecisionMap.read(tmp_path / "map" / "precision_map.json")
    assert found.map_hash == point.map_hash
    assert {unit.kind for unit in found.units} == {"weights", "cache"}
    assert set(found.caches) == {f"model.layers.{i}.{k}_cache" for i in range(2) for k in "kv"}
    model = str(tiny_folders("llama"))
    again, number = apply_map(
        store, tmp_path / "map" / "precision_map.json", model, front.job.id, "none", None
    )
    assert again.point(number).map_hash == point.map_hash


def test_our_own_checkpoint_is_read_back_with_its_cache(done, tmp_path):
    store, front, _ = done
    point = min((p for p in front.points if p.control is None), key=lambda p: p.cache_bytes)
    [written] = export_point(store, front, point.id, ["packed"], tmp_path / "packed", force=False)
    assert written["reloaded_kl"] == pytest.approx(written["measured_kl"], rel=0.02)
    assert written["weight_bytes"] == written["predicted_bytes"] == point.weight_bytes


def test_targets_that_cant_keep_them_say_so(done, tmp_path):
    store, front, _ = done
    point = min((p for p in front.points if p.control is None), key=lambda p: p.cache_bytes)
    for target, why in (
        ("llm-compressor", "can't be told of KV caches"),
        ("gptq", "keeps no KV cache in"),
    ):
        with pytest.raises(ExportError, match=why):
            export_point(store, front, point.id, [target], tmp_path / target, force=False)
        assert not (tmp_path / target).exists()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"menu.cache": ["int5"]}, "unknown format 'int5'"),
        ({"menu.cache": ["gguf-q8_0"]}, "no scheme of the menu applies to model.layers.0.k_cache"),
        ({"menu.cache": ["bf16", "nvfp4"]}, "no KV cache can be kept in nvfp4"),
        ({"menu.cache": ["bf16", "int8-g32/int8-token"]}, "give int8-g32 alone"),
        ({"budgets_bytes": [200_000]}, "bytes of weights and KV cache: the smallest has"),
        ({"serving.tensor_parallel": 2}, "tensor parallelism"),
        (
            {"serving.engine": "compressed-tensors", "menu": "int4-channel-bf16,bf16"},
            "compressed-tensors keeps no KV cache in int8-channel; it has bf16, fp8-e4m3",
        ),
    ],
)
def test_what_cant_be_is_refused_in_a_line(tiny_folders, more, why):
    with pytest.raises((BitfrontError, InfeasibleBudgetError), match=why) as caught:
        make_plan(config_of(tiny_folders("llama"), **more))
    assert "\n" not in str(caught.value)


def test_estimators_that_know_nothing_of_caches_are_left_out(tiny_folders, done):
    store, _, _ = done
    both = make_plan(config_of(tiny_folders("llama"), estimators=["output-error", "row-fisher"]))
    assert settled(both, store).config.estimators == ("row-fisher",)
    none = make_plan(config_of(tiny_folders("llama"), estimators=["output-error"]))
    with pytest.raises(ConfigError, match="output-error can't score KV caches"):
        settled(none, store)


def test_rules_by_kind_and_by_name(tiny_folders):
    """A pin keeps the first layer's keys; engines that fuse caches decide them together."""
    folder = tiny_folders("llama")
    given = config_of(folder).model_dump()
    given["menu"]["pinned"] |= {"*.layers.0.k_cache": "bf16"}
    plan = make_plan(type(config_of(folder)).model_validate(given))
    of = {
        u.name: [s.name for s in row]
        for u, row in zip(plan.layout.units, plan.choices, strict=True)
    }
    assert of["model.layers.0.k_cache"] == ["bf16"]
    assert len(of["model.layers.1.k_cache"]) == 3
    shared = config_of(
        folder, menu="gguf-q8_0,bf16",
        **{"menu.cache": ["bf16", "int8-g32"], "serving.engine": "llama.cpp", "serving.batch": 1},
    )  # fmt: skip
    with pytest.raises(BitfrontError, match="k_cache: heads of 16 numbers don't divide"):
        make_plan(shared)


def test_the_command_takes_a_menu_for_the_cache(bitfront_command, tiny_folders):
    done = subprocess.run(
        [bitfront_command, "search", str(tiny_folders("llama")), "--menu", "int4-g32,int8-g32",
         "--kv-menu", "bf16,int4-channel", "--context", "256", "--dry-run", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    kinds = [unit["kind"] for unit in document["units"]]
    assert kinds.count("cache") == 4
    assert "int8-g32 + KV int4-channel" in [entry["scheme"] for entry in document["uniform"]]


def test_a_dry_run_refuses_what_the_job_would(bitfront_command, tiny_folders):
    done = subprocess.run(
        [bitfront_command, "search", str(tiny_folders("llama")), "--kv-menu", "bf16,int4-channel",
         "--estimators", "output-error", "--dry-run"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "output-error can't score KV caches" in done.stderr


def test_rules_in_a_file_go_with_the_presets_schemes(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("menu: {cache: [bf16, int8-g32]}\n")
    config = load_config("demo", file, {})
    assert config.menu.cache == ("bf16", "int8-g32")
    assert "int4-g32" in config.menu.schemes
    assert caching.FULL_CACHE_BITS == 16


def test_the_best_of_an_audit_of_weights_is_no_default_here(tmp_path, tiny_folders):
    """It was judged on the same formats, and knows nothing of caches."""
    from store.queries import update_job

    store = Store(f"sqlite:///{tmp_path}/s.sqlite").open()
    folder = tiny_folders("llama")
    names = "int4-g32,int8-g32,bf16"
    weights = make_plan(small_config(folder, menu=names))
    job = run_search(weights, store, InProcessPool, Silent())
    judged = [{"name": name} for name in ("fisher", "fisher-quantized", "gradient")]
    audit = {"estimators": judged, "default": "gradient", "audited_at": "2026-01-01"}
    update_job(store, job, facts={"audit": audit})
    auto = {"menu": names, "estimators": ["auto"]}
    assert settled(make_plan(small_config(folder, **auto)), store).config.estimators == (
        "gradient",
    )
    both = {**auto, "menu.cache": ["int4-g32", "int8-g32", "bf16"]}
    assert (
        "gradient" not in settled(make_plan(small_config(folder, **both)), store).config.estimators
    )


def test_rules_of_a_menu_are_of_weights(tiny_folders):
    """A cap on formats leaves caches out, and full precision is exact inputs, too."""
    folder = tiny_folders("llama")
    given = config_of(folder).model_dump()
    given["menu"] |= {
        "schemes": ["int4-g32", "int8-g32", "bf16/int8-token", "bf16"], "most_formats": 1,
        "left_alone": 0.25,
    }  # fmt: skip
    plan = make_plan(type(config_of(folder)).model_validate(given))
    few = plan.problem(plan.bytes_table.astype(float)).few
    of = dict(zip((s.name for s in plan.menu), few.of.tolist(), strict=True))
    assert of["int8-channel"] == of["bf16"] == -1
    assert len({of["int4-g32"], of["int8-g32"]} - {-1}) == 2
    table, _ = plan.changes
    columns = {s.name: i for i, s in enumerate(plan.menu)}
    inside = next(u for u, unit in enumerate(plan.layout.units) if unit.kind == "linear")
    assert table[inside, columns["bf16"]] == 0
    assert table[inside, columns["bf16/int8-token"]] == 1


def test_a_transform_is_tuned_to_a_format_of_weights(tiny_folders):
    plan = make_plan(config_of(tiny_folders("llama"), transform="awq"))
    assert plan.folding.format in ("int4-g32", "int8-g32")


def test_pairs_are_of_weights(done):
    from bitfront.interacting import _chosen

    _, _, plan = done
    units, columns = _chosen(plan, plan.bytes_table.astype(float), 3)
    assert len(units) == 3
    assert not any(plan.caches[u] for u in units)
    assert {plan.menu[c].name for c in columns} <= {"int4-g32", "int8-g32"}


def test_a_recipe_takes_a_map_whose_cache_is_left_alone(done, tmp_path):
    store, front, _ = done
    point = next(p for p in front.points if "KV bf16" in front.candidates[p.id].origin)
    [written] = export_point(
        store, front, point.id, ["llm-compressor"], tmp_path / "r", force=False
    )
    assert written["modules"] == 2 * 7 + 1


def test_analytical_times_of_caches(tiny_folders):
    """No kernel of weights is asked for; what is read counts with its bytes."""
    from bitfront.serving import analytical_times
    from cost_models.devices import load_device
    from engines import load_engine

    plan = make_plan(config_of(tiny_folders("llama")))
    times = analytical_times(
        load_device("mi300x"), load_engine("vllm"), plan.original, plan.layout, plan.menu,
        Workload(1, 4096),
    )  # fmt: skip
    row = int(np.flatnonzero(plan.caches)[0])
    columns = {s.name: i for i, s in enumerate(plan.menu)}
    cells = times.tables_s["decode"][row]
    assert cells[columns["int4-channel"]] < cells[columns["int8-channel"]] < cells[columns["bf16"]]


def test_an_audit_judges_those_that_know_caches(done, tiny_folders):
    """Random maps of weights and caches; the others are named, with why."""
    from bitfront.auditing import AuditOptions, run_audit

    store, _, plan = done
    options = AuditOptions(
        estimators=("fisher", "row-fisher", "output-error"), mixed=8, equal=6, flips=6, pairs=0
    )
    job = run_audit(plan, store, InProcessPool, Silent(), options)
    found = job.facts["audit"]
    assert {entry["name"] for entry in found["estimators"]} == {"fisher", "row-fisher"}
    assert {"output-error", "weight-error"} <= set(found["unable"])
    assert found["null_arms"]["weight error alone"] is None
    mixed = [e["spearman"] for e in found["estimators"]]
    assert min(mixed) > 0.5
