"""Somebody else's map on our front."""

import json

import pytest

from bitfront.applying import apply
from bitfront.config import ConfigError
from bitfront.exporting import export_point
from bitfront.fronts import load_front
from bitfront.pipeline import open_planned, run_search
from bitfront.plan import make_plan, plan_again
from bitfront.progress import Silent
from quantization.errors import ModelError
from store.database import Store
from store.queries import find_job, find_model, update_job
from tests.bitfront.test_pipeline import small_config
from workers.pool import InProcessPool


@pytest.fixture(scope="module")
def folder(tiny_folders):
    return tiny_folders("llama")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(f"sqlite:///{tmp_path_factory.mktemp('applying')}/s.sqlite").open()


@pytest.fixture(scope="module")
def job(folder, store):
    return run_search(make_plan(small_config(folder)), store, InProcessPool, Silent())


def linears(store, job):
    layout = load_front(store, find_job(store, job)).model.layout
    return [s["name"] for u in layout["units"] for s in u["sites"] if u["layer"] is not None]


def test_a_map_of_known_formats_is_the_point_that_it_is(store, job, folder, tmp_path):
    """A uniform map was measured before: the same point, the same loss."""
    front = load_front(store, find_job(store, job))
    control = next(p for p in front.points if p.control == "uniform")
    format = next(iter({*front.candidates[control.id].schemes} - {"bf16"}))
    file = tmp_path / "uniform.json"
    file.write_text(json.dumps(dict.fromkeys(linears(store, job), format)))
    found, number = apply(store, file, str(folder), None, "none", None)
    assert (found.job.id, number) == (job, control.id)
    assert found.point(number).kl == control.kl


def test_a_job_that_read_placeholders_reads_them_again(folder, store, tmp_path):
    corpus = tmp_path / "corpus.txt"
    lines = (f"lobster {i} is a large <unk> , and its <unk> are eaten .\n" for i in range(400))
    corpus.write_text("".join(lines))
    texts = {f"texts.{role}.source": str(corpus) for role in ("calibration", "search", "heldout")}
    config = small_config(folder, **texts)
    old, new = make_plan(config, as_written=True), make_plan(config)
    assert (old.placeholders, new.placeholders) == ({}, {str(corpus): 800})
    assert old.chunks != new.chunks
    for plan in (old, new):
        job = open_planned(plan, store)
        assert plan_again(job, find_model(store, job.model_hash)).chunks == plan.chunks
    assert job.facts["placeholders"] == {str(corpus): 800}


def test_a_map_joins_no_job_whose_text_has_changed(folder, store, tmp_path):
    text, file = tmp_path / "text.txt", tmp_path / "map.json"
    text.write_text("word " * 3000)
    plan = make_plan(small_config(folder, **{"texts.heldout.source": str(text)}))
    job = open_planned(plan, store)
    update_job(store, job.id, state="done")
    linears = [s.name for u in plan.layout.units for s in u.sites if u.layer is not None]
    file.write_text(json.dumps(dict.fromkeys(linears, "nf4-g32")))
    text.write_text("other " * 3000)
    with pytest.raises(ConfigError, match="texts of job .* have changed"):
        apply(store, file, str(folder), job.id, "none", None)


def test_formats_outside_the_menu_become_a_point_that_can_be_exported(store, job, folder, tmp_path):
    file = tmp_path / "foreign.json"
    file.write_text(json.dumps(dict.fromkeys(linears(store, job), "nf4-g32")))
    before = {p.id for p in load_front(store, find_job(store, job)).points}
    found, number = apply(store, file, str(folder), job, "none", None)
    point = found.point(number)
    assert number not in before
    assert point.control == "given"
    assert point.average_bits == pytest.approx(4.5, abs=0.1)
    assert any(f"point {number})" in finding for finding in found.findings)
    written = export_point(
        store, found, number, ["safetensors", "packed"], tmp_path / "out", force=False
    )
    assert [w["folder"] for w in written] == [
        str(tmp_path / "out" / t) for t in ("safetensors", "packed")
    ]
    assert written[1]["weight_bytes"] == point.weight_bytes == written[1]["predicted_bytes"]
    card = (tmp_path / "out" / "packed" / "README.md").read_text()
    assert "bitfront apply precision_map.json" in card
    assert f"{point.kl:.5f} nats a token" in card
    old = tmp_path / "out" / "packed" / "model-00001-of-00002.safetensors"
    old.write_bytes(b"of another layout")
    mine = tmp_path / "out" / "packed" / "notes.txt"
    mine.write_text("mine")
    export_point(store, found, number, ["packed"], tmp_path / "out" / "packed", force=True)
    assert mine.exists()
    assert not old.exists()
    again, same = apply(store, file, str(folder), job, "none", None)
    assert same == number
    assert len(again.points) == len(found.points)


def test_without_a_job_one_begins_for_the_maps_engine(store, folder, tmp_path):
    file = tmp_path / "types.txt"
    file.write_text(".*attn_q.*=q8_0\n.*=q4_0\n")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i % 977} is number {i}" for i in range(60_000)))
    front, number = apply(store, file, str(folder), None, "none", str(text))
    assert front.job.config["serving"]["engine"] == "llama.cpp"
    schemes = front.candidates[number].schemes
    assert {"gguf-q8_0", "gguf-q4_0"} == set(schemes)


def test_other_models_and_divided_units_are_refused(store, job, folder, tiny_folders, tmp_path):
    file = tmp_path / "m.json"
    names = linears(store, job)
    file.write_text(json.dumps(dict.fromkeys(names, 4)))
    with pytest.raises(ConfigError, match="is of another model"):
        apply(store, file, str(tiny_folders("qwen3")), job, "none", None)
    file.write_text(json.dumps({**dict.fromkeys(names, 4), names[0]: 8}))
    with pytest.raises(ModelError, match="which this job decides as one"):
        apply(store, file, str(folder), job, "none", None)
