"""Recipes for other tools: what is written reads back as the map, or is refused."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import Export, load_target
from engines.recipe import canonical
from quantization.errors import ExportError
from quantization.precision_map import (
    ModelEntry,
    PrecisionMap,
    SchemeEntry,
    UnitEntry,
    content_hash,
)

MENUS = {
    "auto-round": ["int4-g128", "int2-g32-asym", "int8-channel", "mxfp4", "nvfp4", "bf16"],
    "modelopt": ["int4-g128", "int8-channel", "fp8-e4m3", "fp8-e4m3-channel", "nvfp4", "bf16"],
    "llm-compressor": ["int4-g64", "int3-g32-asym", "int8-channel", "fp8-e4m3", "nvfp4", "bf16"],
}


def map_of(formats):
    units = tuple(
        UnitEntry(name=n, sites=(n,), scheme=SchemeEntry(weight=f, activation="bf16"))
        for n, f in formats.items()
    )
    found = content_hash({n: f"{f}/bf16" for n, f in formats.items()})
    entry = ModelEntry(name="tiny", weights_hash="0" * 64)
    return PrecisionMap(map_hash=found, model=entry, units=units)


@pytest.mark.parametrize("name", MENUS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_recipe_reads_back_as_the_map(tmp_path_factory, name, data):
    chosen = data.draw(st.lists(st.sampled_from(MENUS[name]), min_size=3, max_size=6))
    formats = {f"model.layers.{i}.mlp.up_proj": format for i, format in enumerate(chosen)}
    folder, target = tmp_path_factory.mktemp("recipe"), load_target(name)
    export = Export(map_of({"model.embed_tokens": "bf16", **formats}))
    target.write(export, folder)
    assert target.check(export, folder)["modules"] == len(formats)
    document = yaml.safe_load((folder / target.file).read_text())
    assert target.formats(document) == {n: canonical(f) for n, f in formats.items()}


@pytest.mark.parametrize("name", MENUS)
def test_what_a_tool_has_no_word_for_is_refused(tmp_path, name):
    with pytest.raises(ExportError):
        load_target(name).write(Export(map_of({"layers.0.up_proj": "gguf-q4_K"})), tmp_path)
    with pytest.raises(ExportError, match=r"embeddings alone, and model\.embed_tokens"):
        load_target(name).write(Export(map_of({"model.embed_tokens": "int8-channel"})), tmp_path)


def test_an_edited_recipe_is_noticed(tmp_path):
    target, export = load_target("auto-round"), Export(map_of({"layers.0.up_proj": "int4-g128"}))
    target.write(export, tmp_path)
    file = tmp_path / target.file
    file.write_text(file.read_text().replace("bits: 4", "bits: 8"))
    with pytest.raises(ExportError, match="reads back otherwise"):
        target.check(export, tmp_path)
