"""Runtimes' rules as data."""

import json

import pytest

from bitfront.engine_views import show_engines
from engines import ENGINES, TARGETS, load_engine, load_target, target_of
from engines.declared import Served, load_runtime
from quantization.adapter import describe
from quantization.errors import BitfrontError, UnknownNameError
from quantization.formats import FORMATS
from quantization.schemes import Scheme


def test_a_rule_speaks_of_weights_with_their_activations():
    served = Served(formats="int4-g*/fp8-token", rows=64, columns=128)
    assert served.matches(Scheme("int4-g64", "fp8-token"))
    assert not served.matches(Scheme("int4-g64"))
    assert served.refusal((64, 128)) is None
    assert served.refusal((32, 128)) == "32 rows don't divide by 64"
    assert served.refusal((64, 96)) == "96 columns don't divide by 128"


def test_formats_that_differ_in_their_scales_are_offered(llama):
    layout = describe(llama)
    site = layout.units[1].stored[0]
    ours, theirs = Scheme("int4-g32"), Scheme("int4-g32-bf16")
    assert "it has int4-g32-bf16, which" in load_engine("mlx").refusal(site, ours)
    assert "it has int4-g32, which" in load_engine("gptq").refusal(site, theirs)
    assert load_engine("mlx").variant(ours) == theirs
    assert load_engine("gptq").variant(theirs) == ours
    assert load_engine("vllm").variant(Scheme("int3-g32")) == Scheme("int3-g32")


def test_a_variant_is_a_format_that_there_is():
    for engine in ENGINES:
        rules = load_engine(engine)
        found = [rules.variant(Scheme(name)).weight for name in FORMATS]
        assert [name for name in found if name not in FORMATS] == []


def test_every_engine_is_printed_with_its_target(capsys):
    show_engines(None, as_json=True)
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(found) == set(ENGINES)
    assert {entry["target"] for entry in found.values()} <= set(TARGETS)
    assert found["llama.cpp"]["timed"]
    assert "gguf-*" in {served["formats"] for served in found["llama.cpp"]["formats"]}
    assert not found["vllm"]["timed"]
    show_engines("vllm", as_json=False)
    told = capsys.readouterr().out
    assert "marlin_utils.py" in told.replace("\n", "")
    assert "int4-g128-bf16" in told


def test_what_an_engine_loads_can_be_written():
    for name in ENGINES:
        assert target_of(name) in TARGETS
        assert load_engine(name).name == name


def test_unknown_names_and_files_are_one_line():
    assert load_target("vllm").name == "compressed-tensors"
    with pytest.raises(UnknownNameError, match="nearest: vllm"):
        show_engines("vllmm", as_json=False)
    with pytest.raises(BitfrontError, match=r"configs/engines/none.yaml can't be used"):
        load_runtime("none")
