"""Jobs whose schemes say how activations are rounded: measured, exported, read back, timed."""

import pytest

from bitfront.applying import apply
from bitfront.config import ConfigError
from bitfront.exporting import export_point
from bitfront.fronts import load_front
from bitfront.pipeline import run_search
from bitfront.plan import make_plan
from bitfront.progress import Silent
from bitfront.settling import settled
from cost_models.devices import load_device
from cost_models.roofline import choose_arithmetic
from quantization.schemes import Scheme
from store.database import Store
from store.queries import find_job
from tests.bitfront.test_pipeline import small_config
from workers.pool import InProcessPool

MENU = (
    "int4-g32-bf16,int8-channel-bf16,int8-channel-bf16/int8-token,fp8-e4m3-channel/fp8-e4m3-token"
)
MORE = {"menu": MENU, "estimators": ["fisher", "output-error"], "menu.cache": ["bf16", "fp8-e4m3"],
        "serving.engine": "compressed-tensors", "serving.context": 64}  # fmt: skip


@pytest.fixture(scope="module")
def done(tiny_folders, tmp_path_factory):
    """A finished job: store, front, plan."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('active')}/s.sqlite").open()
    plan = make_plan(small_config(tiny_folders("llama"), **MORE))
    job = run_search(plan, store, InProcessPool, Silent())
    return store, load_front(store, find_job(store, job)), plan


def test_activations_cost_loss_and_no_bytes(done):
    """The uniform maps of eight bits, with and without."""
    _, front, plan = done
    by = {front.candidates[p.id].origin: p for p in front.points if p.control == "uniform"}
    names = [f"uniform int8-channel-bf16{a} + KV bf16" for a in ("", "/int8-token")]
    plain, active = (by[name] for name in names)
    assert active.kl > plain.kl
    engine_bytes = plan.engine.nbytes(Scheme("int8-channel-bf16"), (64, 64))
    assert plan.engine.nbytes(Scheme.parse(MENU.split(",")[2]), (64, 64)) == engine_bytes - 16
    assert not any("fisher" not in name for name in front.job.facts["estimators"])


@pytest.mark.parametrize(
    "origin", ["int8-channel-bf16/int8-token", "fp8-e4m3-channel/fp8-e4m3-token"]
)
def test_a_map_goes_out_and_comes_back(done, tmp_path, tiny_folders, origin):
    """The checkpoint's own configuration is read as the map that it is of."""
    store, front, plan = done
    point = next(
        p for p in front.points if front.candidates[p.id].origin.startswith(f"uniform {origin}")
    )
    folder = tmp_path / "out"
    [written] = export_point(store, front, point.id, ["compressed-tensors"], folder, force=False)
    assert written["weight_bytes"] == written["predicted_bytes"] == point.weight_bytes
    model = str(tiny_folders("llama"))
    again, number = apply(store, folder / "config.json", model, front.job.id, "none", None)
    assert again.point(number).map_hash == point.map_hash
    card = (folder / "README.md").read_text()
    assert "KV cache" in card


def test_a_cache_is_in_the_map_and_in_the_command(done, tmp_path, tiny_folders):
    """vLLM's scale of 1 needs no tensor; a scheme in the configuration would want some."""
    store, front, _ = done
    names = {p.id: front.candidates[p.id].schemes[-1] for p in front.points}
    point = next(p for p in front.points if names[p.id] == "fp8-e4m3")
    folder = tmp_path / "out"
    [written] = export_point(store, front, point.id, ["compressed-tensors"], folder, force=False)
    assert written["reloaded_kl"] == pytest.approx(written["measured_kl"], rel=0.02, abs=2e-4)
    model, file = str(tiny_folders("llama")), folder / "precision_map.json"
    again, number = apply(store, file, model, front.job.id, "none", None)
    assert again.point(number).map_hash == point.map_hash


def test_a_map_with_a_cache_wants_a_job_that_has_one(done, tmp_path, tiny_folders):
    store, front, _ = done
    names = {p.id: front.candidates[p.id].schemes[-1] for p in front.points}
    point = next(p for p in front.points if names[p.id] == "fp8-e4m3")
    export_point(store, front, point.id, ["map"], tmp_path / "out", force=False)
    other = Store(f"sqlite:///{tmp_path}/other.sqlite").open()
    plan = make_plan(small_config(tiny_folders("llama")))
    job = run_search(plan, other, InProcessPool, Silent())
    file, model = tmp_path / "out" / "precision_map.json", str(tiny_folders("llama"))
    with pytest.raises(ConfigError, match="quantizes the KV cache, which this job leaves as it is"):
        apply(other, file, model, job, "none", None)


def test_devices_multiply_in_the_type_of_both():
    device = load_device("h100-sxm")
    kinds = {
        "int8-channel-bf16": "bf16", "int8-channel-bf16/int8-token": "int8",
        "fp8-e4m3-channel/fp8-e4m3-token": "fp8",
    }  # fmt: skip
    for name, arithmetic in kinds.items():
        assert choose_arithmetic(Scheme.parse(name), device, "vllm") == arithmetic


def test_experts_and_embeddings_keep_their_inputs(tiny_folders):
    config = small_config(tiny_folders("mixtral"), menu="int8-channel,int8-channel/int8-token")
    plan = make_plan(config)
    for unit, row in zip(plan.layout.units, plan.choices, strict=True):
        assert (unit.kind == "linear") == any(s.activation != "bf16" for s in row)
    assert settled(plan, None).config.estimators == ("fisher",)
