"""Checkpoints of other formats: predicted bytes, the measured loss, and the map read back."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import (
    Export,
    checkpoint_files,
    compressed_config,
    gptq,
    load_engine,
    load_target,
    mlx,
)
from engines.checkpoint_files import tensor_bytes
from engines.packed_checkpoint import load_packed
from engines.regular import named
from engines.reload import check_served, predicted_bytes
from engines.vllm_caches import cache_flags, layer_caches
from evaluation.evaluator import Evaluator
from quantization.activations import ACTIVATIONS
from quantization.adapter import describe
from quantization.errors import ExportError, ModelError
from quantization.formats import FORMATS
from quantization.kernels.packed_weight import PackedWeight
from quantization.precision_map import ModelEntry, build_map
from quantization.schemes import Scheme
from tests.conftest import choices_of
from tests.engines.test_exports import CHUNKS

FLOAT = "fp8-e4m3-channel"
MENUS = {
    "packed": ["int3-g32-asym", "nf4-g32", "gguf-q4_0", "bf16"],
    "compressed-tensors": [
        "int4-g32-bf16", "int3-g32-asym-bf16", "int8-channel-bf16", "int5-channel-asym-bf16",
        "fp8-e4m3-channel", "fp8-e4m3", "nvfp4", "bf16",
    ],
    "compressed-tensors, symmetric": ["int4-g32-bf16", "int8-channel-bf16", FLOAT, "nvfp4", "bf16"],
    "torchao": ["int4-g32-bf16", "int3-channel-bf16", "int8-channel-bf16", FLOAT, "bf16"],
    "gptq": ["int4-g32", "int3-g32", "int2-g32", "int8-channel", "bf16"],
    "mlx": ["int4-g32-bf16", "int3-g32-bf16", "int5-g32-bf16", "int6-g32-bf16", "bf16"],
}  # fmt: skip


def export_of(bank, schemes):
    """A map with its measured loss."""
    evaluator = Evaluator(bank, torch.device("cpu"))
    losses = [evaluator.measure(schemes, ids) for ids in CHUNKS]
    kl = sum(loss.kl_sum for loss in losses) / sum(loss.tokens for loss in losses)
    pairs = [(s.weight, s.activation) for s in schemes]
    entry = ModelEntry(name="tiny", weights_hash="0" * 64)
    return Export(build_map(bank.layout, pairs, entry, {}), evaluator, CHUNKS, kl)


def mixed_export(bank, menu):
    """Each unit in another format, in turns; embedding and head alone."""
    names = [s.name for s in map(Scheme.parse, menu)]
    inner = [unit for unit in bank.layout.units if unit.layer is not None]
    chosen = {unit.name: names[i % len(names)] for i, unit in enumerate(inner)}
    return export_of(bank, [Scheme(chosen.get(unit.name, "bf16")) for unit in bank.layout.units])


@pytest.fixture
def export_to(make_bank):
    def made(target, family="llama"):
        bank = make_bank(family)
        bank.build(choices_of(bank.layout, [Scheme.parse(name) for name in MENUS[target]]))
        return mixed_export(bank, MENUS[target])

    return made


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
@pytest.mark.parametrize("name", MENUS)
def test_what_is_loaded_has_the_measured_loss_and_the_predicted_bytes(
    export_to, tmp_path, name, family
):
    """Tied heads and biases included."""
    export, target = export_to(name, family), load_target(name.split(",")[0])
    target.write(export, tmp_path)
    found = target.check(export, tmp_path)
    assert found["reloaded_kl"] == pytest.approx(export.measured_kl, rel=0.02, abs=2e-4)
    if name.startswith("compressed-tensors"):
        assert found["loader"] == (target.name if name == target.name else "transformers")
    bank = export.evaluator.bank
    rules, schemes = load_engine(target.engine), export.precision_map.schemes
    assert found["weight_bytes"] == tensor_bytes(tmp_path)
    assert found["weight_bytes"] == predicted_bytes(rules, bank.checkpoint, bank.layout, schemes)


@pytest.mark.parametrize(
    "name", ["compressed-tensors", "compressed-tensors, symmetric", "torchao", "gptq", "mlx"]
)
def test_the_values_are_the_candidates(export_to, tmp_path, name):
    """Not only as good: the same numbers, but for bfloat16 where the library computes in it."""
    export, target = export_to(name), load_target(name.split(",")[0])
    target.write(export, tmp_path)
    model = target.load(export, tmp_path)
    model(torch.tensor([[1, 2]]))  # compressed-tensors decompresses in the first pass
    bank = export.evaluator.bank
    # the libraries compute in bfloat16: one rounding, or one for each of scale, scale and product
    close = {"gptq": 0.0, "mlx": 0.0, "compressed-tensors, symmetric": 2**-7}.get(name, 2**-8)
    for unit, scheme in zip(bank.layout.units, export.precision_map.schemes, strict=True):
        if scheme == Scheme("bf16"):
            continue
        for site in unit.stored:
            own = bank.tensors(unit, scheme)[site.parameter]
            loaded = model.get_parameter(site.parameter).float()
            torch.testing.assert_close(loaded, own.float(), rtol=close, atol=0.0)


@pytest.mark.parametrize("name", MENUS)
def test_a_file_that_computes_something_else_is_refused(export_to, tmp_path, name):
    export, target = export_to(name), load_target(name.split(",")[0])
    target.write(export, tmp_path)
    object.__setattr__(export, "measured_kl", 2 * export.measured_kl)
    with pytest.raises(ExportError, match="nothing was exported"):
        target.check(export, tmp_path)


@pytest.mark.parametrize("name", ["gptq", "mlx", "torchao", "packed"])
def test_several_files_with_an_index_are_one_checkpoint(export_to, tmp_path, monkeypatch, name):
    monkeypatch.setattr(checkpoint_files, "FILE_BYTES", 20_000)
    export, target = export_to(name), load_target(name)
    target.write(export, tmp_path)
    index = json.loads((tmp_path / checkpoint_files.INDEX).read_text())
    files = {file.name for file in tmp_path.glob("*.safetensors")}
    assert len(files) > 2
    assert set(index["weight_map"].values()) == files
    assert index["metadata"]["total_size"] == tensor_bytes(tmp_path)
    target.check(export, tmp_path)


@pytest.mark.parametrize("name", ["gptq", "mlx"])
def test_a_configuration_that_says_otherwise_is_noticed(export_to, tmp_path, name):
    """The files are read by what they say of themselves, not by what we know."""
    export, target = export_to(name), load_target(name)
    target.write(export, tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    if name == "mlx":
        key = next(k for k, v in config["quantization"].items() if isinstance(v, dict))
        config["quantization"][key]["bits"] = 8
    else:
        config["quantization_config"]["bits"] = 8
    file.write_text(json.dumps(config))
    with pytest.raises((ExportError, ModelError)):
        target.check(export, tmp_path)


def test_what_lies_beside_the_weights_comes_along(export_to, tmp_path):
    export = export_to("gptq")
    source = Path(export.evaluator.bank.checkpoint.folder)
    assert (source / "generation_config.json").exists()
    load_target("gptq").write(export, tmp_path)
    told = json.loads((tmp_path / "generation_config.json").read_text())
    assert told["eos_token_id"] == 1


def test_rules_of_gptq_match_what_vllm_fuses():
    """vLLM looks a rule up by the fused module's name, older releases by that alone."""
    base, other = "model.layers.{}.self_attn.{}_proj", "model.layers.{}.mlp.{}_proj"
    chosen = {base.format(0, w): "int4-g32" for w in "qkv"}
    chosen |= {base.format(1, w): "int8-g32" for w in "qkv"}
    chosen |= {other.format(i, w): "bf16" for i in range(2) for w in ("gate", "up")}
    config = gptq.config_of(chosen)
    fused = ["model.layers.1.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"]
    assert list(gptq.formats_of(config, fused).values()) == ["int8-g32", "bf16"]
    assert gptq.formats_of(config, list(chosen)) == chosen


def test_nvfp4_of_fused_matrices_is_not_vllms(llama):
    units = {len(u.stored): u for u in describe(llama).units if u.layer is not None}
    assert "one tensor scale" in load_engine("vllm").unit_refusal(units[3], Scheme("nvfp4"))
    assert "one tensor scale" not in load_engine("vllm").unit_refusal(units[1], Scheme("nvfp4"))


def test_our_own_checkpoint_stays_packed(export_to, tmp_path):
    export = export_to("packed")
    load_target("packed").write(export, tmp_path)
    model = load_packed(tmp_path, torch.float32)
    weights = [p for p in model.parameters() if isinstance(p.data, PackedWeight)]
    packed = [s for s in export.precision_map.schemes if s != Scheme("bf16")]
    assert len(weights) >= len(packed) > 0
    assert {w.data.packed.format for w in weights} == {s.weight for s in packed}


def test_fused_layers_that_differ_are_refused(llama):
    """A map of an engine that fuses nothing may divide what this target loads as one."""
    layout = describe(llama).split()
    of = {None: "bf16", **dict.fromkeys(range(2), "int8-channel")}
    schemes = [Scheme("int4-g32" if "q_proj" in u.name else of[u.layer]) for u in layout.units]
    with pytest.raises(ExportError, match=r"q_proj\+k_proj\+v_proj: one matrix, which can't be in"):
        check_served(gptq.GPTQ(), llama, layout, schemes)


def test_refusals_name_units_and_reasons(llama):
    layout = describe(llama)
    schemes = [Scheme("bf16" if u.layer is None else "int3-g32-asym") for u in layout.units]
    with pytest.raises(ExportError, match=r"q_proj.*has no kernel for int3-g32-asym; it has int4"):
        check_served(load_engine("vllm"), llama, layout, schemes)


def test_vllm_needs_its_kernels_shapes(llama):
    vllm, layout = load_engine("vllm"), describe(llama)
    site = layout.units[1].stored[0]
    assert "64 columns don't divide by 128" in vllm.refusal(site, Scheme("int4-g64-bf16"))
    assert vllm.refusal(site, Scheme("bf16")) is None
    head = next(unit for unit in layout.units if unit.kind == "head")
    assert "full precision" in vllm.unit_refusal(head, Scheme("int4-g64-bf16"))


NAMES = [f"model.layers.{i}.mlp.{w}_proj" for i in range(3) for w in ("up", "down")]


def maps(names):
    return st.lists(st.sampled_from(names), min_size=len(NAMES), max_size=len(NAMES)).filter(
        lambda chosen: set(chosen) != {"bf16"}
    )


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_configurations_read_back_as_the_map(data):
    """GPTQ's `dynamic`, MLX's layers and compressed-tensors' groups, through its own library."""
    for module, menu in ((gptq, "gptq"), (mlx, "mlx")):
        chosen = dict(zip(NAMES, data.draw(maps(MENUS[menu])), strict=True))
        config = json.loads(json.dumps(module.config_of(chosen)))
        assert module.formats_of(config, NAMES) == chosen


def begun(checkpoint, chosen):
    """The first units of the blocks in these formats, the rest in full precision."""
    layout = describe(checkpoint)
    units = [unit for unit in layout.units if unit.layer is not None][: len(chosen)]
    of = dict(zip((unit.name for unit in units), chosen, strict=False))
    return layout, [Scheme(of.get(unit.name, "bf16")) for unit in layout.units]


@settings(max_examples=10, deadline=None)
@given(maps(MENUS["compressed-tensors"]))
def test_compressed_tensors_reads_back_as_the_map(llama, chosen):
    pytest.importorskip("compressed_tensors")
    layout, schemes = begun(llama, chosen)
    config = json.loads(json.dumps(compressed_config.config_of(layout, schemes)))
    wanted = named(layout, schemes)
    assert compressed_config.formats_of(config, list(wanted)) == wanted


@settings(max_examples=10, deadline=None)
@given(maps(MENUS["torchao"]))
def test_torchao_reads_back_as_the_map(llama, chosen):
    pytest.importorskip("torchao")
    from engines import torchao

    layout, schemes = begun(llama, chosen)
    config = load_target("torchao").config_of(layout, schemes)["quantization_config"]
    wanted = named(layout, schemes)
    assert torchao.formats_of(json.loads(json.dumps(config)), list(wanted)) == wanted


@pytest.mark.filterwarnings("ignore:Config Deprecation")  # of the test's own
def test_torchaos_patterns_and_its_usual_configuration_are_read():
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    from engines import torchao

    four = quantization.IntxWeightOnlyConfig(torch.int4, PerGroup(64))
    chosen = {
        "re:.*down_proj": None,
        NAMES[0]: quantization.Float8WeightOnlyConfig(),
        "_default": four,
    }
    config = TorchAoConfig(quantization.FqnToConfig(chosen)).to_dict()
    found = torchao.formats_of(config, NAMES)
    assert found[NAMES[0]] == FLOAT
    assert {found[n] for n in NAMES if "down" in n} == {"bf16"}
    assert {found[n] for n in NAMES[2:] if "up" in n} == {"int4-g64-bf16"}
    other = quantization.IntxWeightOnlyConfig(
        torch.int4, PerGroup(64), quantization.MappingType.ASYMMETRIC
    )
    config = TorchAoConfig(quantization.FqnToConfig({"_default": other})).to_dict()
    with pytest.raises(ExportError, match="no format here"):
        torchao.formats_of(config, NAMES)


def test_every_declared_pattern_names_a_format():
    for name in ("vllm", "compressed-tensors", "torchao", "gptq", "mlx", "llama.cpp"):
        for served in load_engine(name).runtime.formats:
            read = served.formats.partition("/")[2] or "bf16"
            assert read == "bf16" or read in ACTIVATIONS, f"{name}: {read} is no activation format"
            known = [f for f in FORMATS if served.matches(Scheme(f, read))]
            assert known, f"{name}: {served.formats} stands for nothing"


def test_compressed_tensors_says_what_the_cache_is_kept_in(llama, tmp_path):
    """One format for all of it; the reload quantizes what its attentions write."""
    from quantization.bank import Bank
    from quantization.quantizers import QUANTIZERS

    layout = describe(llama).with_caches(load_engine("compressed-tensors").cache_sharing)
    menu = ["int4-g32-bf16", "bf16"]
    choices = [
        [Scheme("fp8-e4m3")] if unit.kind == "cache" else row
        for unit, row in zip(
            layout.units,
            [*choices_of(describe(llama), [Scheme(name) for name in menu]), None],
            strict=True,
        )
    ]
    choices = [list(row) for row in choices]
    bank = Bank(llama, layout, QUANTIZERS["rtn"], torch.bfloat16)
    bank.build(choices)
    evaluator = Evaluator(bank, torch.device("cpu"))
    schemes = [row[0] for row in choices]
    losses = [evaluator.measure(schemes, ids) for ids in CHUNKS]
    kl = sum(loss.kl_sum for loss in losses) / sum(loss.tokens for loss in losses)
    pairs = [(s.weight, s.activation) for s in schemes]
    names = build_map(layout, pairs, ModelEntry(name="tiny", weights_hash="0" * 64), {})
    export = Export(names, evaluator, CHUNKS, kl)
    target = load_target("compressed-tensors")
    target.write(export, tmp_path)
    found = target.check(export, tmp_path)
    assert found["reloaded_kl"] == pytest.approx(kl, rel=0.02)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not [name for name, _ in plain.named_parameters() if "k_scale" in name]  # nor missing
    theirs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    assert compressed_config.cache_format_of({"kv_cache_scheme": theirs}) == "fp8-e4m3"
    assert compressed_config.cache_format_of({"kv_cache_scheme": None}) == "bf16"


ACTIVE = [
    "int8-channel-bf16/int8-token",
    "fp8-e4m3-channel/fp8-e4m3-token",
    "int4-g32-bf16",
    "bf16",
]


def active_export(bank, menu):
    """Each unit under another scheme, in turns."""
    names = [Scheme.parse(name) for name in menu]
    schemes = [
        Scheme("bf16") if unit.layer is None else names[i % len(names)]
        for i, unit in enumerate(bank.layout.units)
    ]
    return export_of(bank, schemes)


@pytest.mark.parametrize("menu", [ACTIVE, ACTIVE[:1], ACTIVE[1:2]], ids=["mixed", "int8", "fp8"])
@pytest.mark.parametrize("name", ["compressed-tensors", "packed"])
def test_activations_are_quantized_by_what_loads_it(llama, tmp_path, name, menu):
    from quantization.bank import Bank
    from quantization.quantizers import QUANTIZERS

    layout = describe(llama)
    bank = Bank(llama, layout, QUANTIZERS["rtn"], torch.float32)
    plain = [Scheme(Scheme.parse(n).weight) for n in menu]
    bank.build(choices_of(layout, [*plain, *(Scheme.parse(n) for n in menu)]))
    export = active_export(bank, menu)
    target = load_target(name)
    target.write(export, tmp_path)
    found = target.check(export, tmp_path)
    # the library multiplies codes by scales in bfloat16
    assert found["reloaded_kl"] == pytest.approx(export.measured_kl, rel=0.02, abs=1e-4)
    weights = [Scheme(unit.scheme.weight) for unit in export.precision_map.units]
    alone = [export.evaluator.measure(weights, ids) for ids in CHUNKS]
    without = sum(loss.kl_sum for loss in alone) / sum(loss.tokens for loss in alone)
    assert found["reloaded_kl"] > 1.1 * without
    if name == "packed":
        return
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    sites = [s.name for u in layout.units if u.kind == "linear" for s in u.sites]
    read = compressed_config.formats_of(config, sites)
    wanted = {
        site: Scheme(unit.scheme.weight, unit.scheme.activation).name
        for unit in export.precision_map.units
        for site in unit.sites
        if site in sites
    }
    assert read == wanted


def test_vllm_is_told_of_layers_whose_cache_stays(llama):
    layout = describe(llama).with_caches(load_engine("vllm").cache_sharing)
    caches = [unit for unit in layout.units if unit.kind == "cache"]
    assert [unit.name for unit in caches] == [f"model.layers.{i}.kv_cache" for i in range(2)]
    assert [len(unit.sites) for unit in caches] == [2, 2]
    plain = [Scheme("bf16")] * (len(layout.units) - 2)

    def flags(*names):
        return cache_flags(layer_caches(layout, [*plain, *map(Scheme, names)]))

    assert flags("bf16", "bf16") == ""
    assert flags("fp8-e4m3", "fp8-e4m3") == " --kv-cache-dtype fp8"
    assert flags("fp8-e4m3", "bf16") == (" --kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 1")
    apart = describe(llama).with_caches("apart")
    mixed = [*plain, *map(Scheme, ("fp8-e4m3", "bf16", "bf16", "bf16"))]
    with pytest.raises(ExportError, match="layer 0 has keys and values in fp8-e4m3 and bf16"):
        layer_caches(apart, mixed)
