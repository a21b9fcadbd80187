"""Precision maps: a content hash that means something, and a closed schema."""

import json

import pytest

from quantization.errors import ModelError
from quantization.precision_map import ModelEntry, PrecisionMap, build_map, map_hash
from quantization.units import Kept, Layout, Site, Unit

LAYOUT = Layout(
    units=(
        Unit(
            "a.q+k",
            "linear",
            (Site("a.q", "a.q.weight", (4, 4)), Site("a.k", "a.k.weight", (4, 4))),
            0,
        ),
        Unit("a.o", "linear", (Site("a.o", "a.o.weight", (4, 4)),), 0),
    ),
    kept=(Kept("a.gate", "routes tokens to experts", 4),),
    other_numel=8,
)


def example(schemes=(("int4-g64", "bf16"), ("bf16", "bf16")), **provenance):
    return build_map(LAYOUT, schemes, ModelEntry(name="m", weights_hash="0" * 64), provenance)


def test_units_have_the_pinned_form():
    document = json.loads(example().to_json())
    assert document["units"][0]["sites"] == ["a.q", "a.k"]
    assert document["units"][0]["scheme"] == {"weight": "int4-g64", "activation": "bf16"}


def test_the_hash_covers_content_and_nothing_else():
    assert example(job=1).map_hash == example(job=2).map_hash
    assert example().map_hash != example((("int8-g64", "bf16"), ("bf16", "bf16"))).map_hash


def test_the_hash_does_not_depend_on_grouping():
    split = Layout(
        tuple(Unit(s.name, "linear", (s,), 0) for u in LAYOUT.units for s in u.sites), (), 8
    )
    fused = map_hash(LAYOUT, [("int4-g64", "bf16"), ("bf16", "bf16")])
    assert map_hash(split, [("int4-g64", "bf16")] * 2 + [("bf16", "bf16")]) == fused


def test_a_map_survives_its_file(tmp_path):
    (tmp_path / "m.json").write_text(example(job=1).to_json())
    assert PrecisionMap.read(tmp_path / "m.json") == example(job=1)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda d: d["units"][0]["scheme"].update(weight="int8-g64"), "the file was edited"),
        (lambda d: d.update(extra=1), "Extra inputs"),
        (lambda d: d.update(schema_version=2), "schema_version"),
    ],
)
def test_an_edited_file_is_refused(tmp_path, edit, complaint):
    document = json.loads(example().to_json())
    edit(document)
    (tmp_path / "m.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=complaint):
        PrecisionMap.read(tmp_path / "m.json")
