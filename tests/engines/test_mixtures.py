"""Mixtures of experts in checkpoints: each expert by itself under the name that loaders know."""

import json

import pytest
import torch
from safetensors.torch import load_file

from engines import gptq, load_target
from engines.file_names import ANY, as_files_call, places_of
from engines.foreign import read_map
from quantization.checkpoints import load_model
from quantization.errors import ExportError
from quantization.schemes import Scheme
from quantization.weights import skeleton
from tests.conftest import choices_of
from tests.engines.test_checkpoint_targets import export_of

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"]
MENUS = {
    "compressed-tensors": [
        "int4-g32-bf16", "fp8-e4m3", "int3-g32-asym-bf16", "int8-channel-bf16/int8-token", "nvfp4", "bf16",
    ],
    "gptq": ["int4-g32", "int8-g32", "bf16"],
    "mlx": ["int4-g32-bf16", "int6-g32-bf16", "bf16"],
    "torchao": ["int4-g32-bf16"],
}  # fmt: skip


@pytest.fixture
def mixture(make_bank):
    """Units under the formats of a menu in turns, full precision where the target serves no other."""

    def made(name, family):
        menu = [Scheme.parse(scheme) for scheme in MENUS[name]]
        bank = make_bank(family)
        bank.build(choices_of(bank.layout, [*menu, Scheme("bf16")]))
        rules, schemes = load_target(name).rules, []
        for number, unit in enumerate(bank.layout.units):
            wanted = menu[number % len(menu)]
            if unit.kind == "experts":  # there are few of these, and the last scheme is exact
                wanted = menu[unit.layer % (len(menu) - 1)] if len(menu) > 1 else menu[0]
            served = unit.layer is not None and not rules.unit_refusal(unit, wanted)
            schemes.append(wanted if served else Scheme("bf16"))
        return export_of(bank, schemes), schemes

    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MENUS)
def test_it_is_read_back_as_it_was_measured(mixture, tmp_path, name, family):
    """Loss, predicted bytes and the map; torchao's experts stay in full precision."""
    export, schemes = mixture(name, family)
    bank, target = export.evaluator.bank, load_target(name)
    target.write(export, tmp_path)
    found = target.check(export, tmp_path)
    assert found["reloaded_kl"] == pytest.approx(found["measured_kl"], rel=0.02, abs=2e-4)
    assert found["measured_kl"] > 0.001
    quantized = [u.kind for u, s in zip(bank.layout.units, schemes, strict=True) if not s.exact]
    assert ("experts" in quantized) == (name != "torchao")
    read = read_map(tmp_path / "config.json", bank.checkpoint, bank.layout).formats
    for unit, scheme in zip(bank.layout.units, schemes, strict=True):
        if unit.layer is not None:
            wanted = {scheme.name.replace("-bf16", "-real") if name == "mlx" else scheme.name}
            assert {read.get(site.name, "bf16") for site in unit.sites} == wanted


def test_an_exports_folder_is_read_as_the_map_itself(mixture, tmp_path):
    """Where its configuration would say less: MLX's biases are free."""
    export, schemes = mixture("mlx", "mixtral")
    bank = export.evaluator.bank
    load_target("mlx").write(export, tmp_path)
    read = read_map(tmp_path, bank.checkpoint, bank.layout).formats
    for unit, scheme in zip(bank.layout.units, schemes, strict=True):
        assert {read[site.name] for site in unit.sites} == {scheme.name}


@pytest.mark.parametrize("family", FAMILIES)
def test_files_call_things_as_transformers_does(mixture, tmp_path, family):
    """What isn't quantized has the names and shapes that transformers saves."""
    export, schemes = mixture("gptq", family)
    (tmp_path / "made").mkdir()
    load_target("gptq").write(export, tmp_path / "made")
    model = load_model(export.evaluator.bank.checkpoint, torch.float32)
    model.save_pretrained(tmp_path / "saved")
    (saved,) = (tmp_path / "saved").glob("*.safetensors")
    wanted = {name: tensor.shape for name, tensor in load_file(saved).items()}
    made = load_file(tmp_path / "made" / "model.safetensors")
    plain = {name: t.shape for name, t in made.items() if name in wanted}
    assert plain.items() <= wanted.items()
    assert {n.removesuffix(".weight") for n in wanted.keys() - plain.keys()} == {
        name.removesuffix(".qweight") for name in made if name.endswith(".qweight")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_of_all_places_are_the_parameter(make_bank, family):
    """Every number of a packed parameter lies in exactly one matrix of the files."""
    module = skeleton(make_bank(family).checkpoint, torch.float32)
    places = places_of(module)
    packed = {name: p for name, p in module.named_parameters() if p.dim() == 3}
    assert packed
    for name, parameter in packed.items():
        seen = torch.zeros(parameter.shape)
        for place in places[name]:
            place.of(seen).add_(1)
        assert bool((seen == 1).all())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "gpt_oss", "granitemoe"])
def test_models_without_experts_to_take_apart_keep_their_names(make_bank, family):
    assert places_of(skeleton(make_bank(family).checkpoint, torch.float32)) == {}


def test_experts_that_files_hold_together_are_refused(make_bank, tmp_path):
    """By name and with what helps; in full precision they are exported."""
    bank = make_bank("granitemoe")
    bank.build(choices_of(bank.layout, [Scheme("int4-g32"), Scheme("bf16")]))
    kinds, target = [unit.kind for unit in bank.layout.units], load_target("gptq")
    schemes = [Scheme("int4-g32" if kind in ("linear", "experts") else "bf16") for kind in kinds]
    with pytest.raises(ExportError, match="isn't stored expert by expert"):
        target.write(export_of(bank, schemes), tmp_path)
    schemes = [Scheme("int4-g32" if kind == "linear" else "bf16") for kind in kinds]
    export = export_of(bank, schemes)
    target.write(export, tmp_path)
    assert target.check(export, tmp_path)["measured_kl"] > 0.001  # or it raises


def test_transposed_experts_stay_as_they_are(make_bank, tmp_path):
    """gpt-oss stores inputs before outputs; vLLM asks for the module that holds its experts."""
    bank, target = make_bank("gpt_oss"), load_target("gptq")
    bank.build(choices_of(bank.layout, [Scheme("int4-g32"), Scheme("bf16")]))
    kinds = [unit.kind for unit in bank.layout.units]
    assert "experts" in kinds
    schemes = [Scheme("int4-g32" if kind == "linear" else "bf16") for kind in kinds]
    export = export_of(bank, schemes)
    target.write(export, tmp_path)
    assert target.check(export, tmp_path)["measured_kl"] > 0.001  # or it raises
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    path = "model.layers.1.mlp.experts"
    assert gptq.formats_of(config, [path]) == {path: "bf16"}
    read = read_map(tmp_path / "config.json", bank.checkpoint, bank.layout).formats
    assert not any("experts" in name for name in read)


def test_a_rule_covers_all_experts_and_what_vllm_asks_for(make_bank):
    """vLLM looks a layer's experts up by the module that holds them."""
    bank = make_bank("qwen3_moe")
    named = as_files_call(bank.layout, places_of(skeleton(bank.checkpoint, torch.float32)))
    [experts] = [u for u in named.units if u.kind == "experts" and u.layer == 1]
    path = "model.layers.1.mlp.experts"
    assert [s.name for s in experts.sites] == [
        f"{path}.{ANY}.{leaf}_proj" for leaf in ("gate", "up", "down")
    ]
    schemes = [Scheme("int4-g32") if u.layer == 1 else Scheme("bf16") for u in named.units]
    config = load_target("gptq").config_of(named, schemes)["quantization_config"]
    names = [path, f"{path}.3.up_proj", "model.layers.0.mlp.experts.3.up_proj"]
    assert [*gptq.formats_of(config, names).values()] == ["int4-g32", "int4-g32", "bf16"]


def test_experts_that_others_quantized_apart_are_told(mixture, tmp_path):
    """A layer's experts are one unit here."""
    export, _ = mixture("gptq", "qwen3_moe")
    bank = export.evaluator.bank
    load_target("gptq").write(export, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rules = config["quantization_config"]["dynamic"]
    name = r"^model\.layers\.0\.mlp\.experts\.2\.up_proj$"
    config["quantization_config"]["dynamic"] = {f"+:{name}": {"bits": 3}, **rules}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"parts of model.layers.0.mlp.experts.gate_up_proj in"):
        read_map(tmp_path / "config.json", bank.checkpoint, bank.layout)
