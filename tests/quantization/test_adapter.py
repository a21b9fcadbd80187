"""Units are found by structure, in every family, without its name."""

import pytest
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from quantization.adapter import ROUTER, describe, find_units
from quantization.checkpoints import resolve
from quantization.errors import ModelError
from quantization.units import Layout
from tests.conftest import CONFIGS, tiny_config


def layout_of(family, **more) -> Layout:
    with FakeTensorMode():
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **more))
        return find_units(model)


def first_block(layout):
    return [unit.name.partition(".0.")[2] for unit in layout.units if unit.layer == 0]


SEPARATE = [
    "self_attn.q_proj+k_proj+v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj+up_proj",
    "mlp.down_proj",
]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "cohere"])
def test_attention_and_mlp_fuse_by_what_they_read(family):
    """Cohere's attention and MLP read the same tensor in parallel, and stay apart."""
    assert first_block(layout_of(family)) == SEPARATE


def test_an_architecture_that_is_fused_already():
    assert first_block(layout_of("gpt_neox")) == [
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ]


def test_packed_experts_are_one_unit_and_routers_stay():
    layout = layout_of("mixtral")
    experts = next(unit for unit in layout.units if unit.kind == "experts")
    assert [site.shape for site in experts.sites] == [(4, 192, 64), (4, 64, 96)]
    assert [(k.name, k.reason) for k in layout.kept] == [
        (f"model.layers.{i}.mlp.gate", ROUTER) for i in range(2)
    ]


def test_shared_experts_stay_apart_from_routed_ones():
    layout = layout_of("qwen2_moe")
    assert first_block(layout)[2:] == [
        "mlp.experts.gate_up_proj+down_proj",
        "mlp.shared_expert.gate_proj+up_proj",
        "mlp.shared_expert.down_proj",
    ]
    kept = {k.name.partition(".0.")[2]: k.reason for k in layout.kept if ".0." in k.name}
    assert kept == {"mlp.gate": ROUTER, "mlp.shared_expert_gate": ROUTER}


def test_experts_stored_inputs_first_are_turned():
    layout = layout_of("gpt_oss")
    experts = next(unit for unit in layout.units if unit.kind == "experts")
    assert all(site.transposed for site in experts.sites)
    assert [site.shape for site in experts.sites] == [(4, 192, 64), (4, 64, 96)]


@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_parameter_is_counted_exactly_once(family):
    """And what checkpoints hold beside them: a router's corrections, in DeepSeek's."""
    with FakeTensorMode():
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family))
        total = sum({id(p): p.numel() for p in model.state_dict(keep_vars=True).values()}.values())
        parameters = sum(p.numel() for p in model.parameters())
        assert total - parameters == (4 if family == "deepseek_v3" else 0)
        layout = find_units(model)
    assert sum(unit.numel for unit in layout.units) + layout.other_numel == total
    sites = [site.parameter for unit in layout.units for site in unit.stored]
    assert len(sites) == len(set(sites))


def test_tied_embedding_and_head_are_one_unit_stored_once():
    unit = layout_of("qwen3").units[0]
    assert unit.kind == "embedding"
    assert [site.name for site in unit.sites] == ["model.embed_tokens", "lm_head"]
    assert unit.numel == 320 * 64
    kinds = [unit.kind for unit in layout_of("llama").units]
    assert (kinds[0], kinds[-1]) == ("embedding", "head")


def test_what_cannot_be_placed_is_reported_by_name():
    with FakeTensorMode():
        model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))
        model.model.layers[1].mlp.unused = nn.Linear(64, 64)
        model.model.outside = nn.Linear(64, 64)
        layout = find_units(model)
    reasons = {kept.name: kept.reason for kept in layout.kept}
    assert reasons == {
        "model.layers.1.mlp.unused": "not used in a forward pass",
        "model.outside": "a linear layer outside the decoder blocks",
    }


def test_the_cache_of_each_layer_is_known():
    """Two key-value heads of 16: 64 numbers a token; a sliding window caps its tokens."""
    assert [layer.elements for layer in layout_of("llama").cache] == [64, 64]
    windows = {layer.window for layer in layout_of("gemma2", sliding_window=32).cache}
    assert windows == {None, 32}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_layouts_survive_json(family):
    layout = layout_of(family)
    assert Layout.from_json(layout.to_json()) == layout


def test_a_model_without_linear_layers_is_refused(tmp_path):
    with FakeTensorMode(), pytest.raises(ModelError, match="none of the model's layers"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))
        model.model.layers = nn.ModuleList()
        find_units(model)


def test_describing_reads_no_weights(tiny_folders, tmp_path):
    """The layout comes from the configuration: it works with the weights gone."""
    folder = tiny_folders("llama")
    layout = describe(resolve(str(folder)))
    copy = tmp_path / "config-only"
    copy.mkdir()
    for file in folder.iterdir():
        content = b"" if file.suffix == ".safetensors" else file.read_bytes()
        (copy / file.name).write_bytes(content)
    assert describe(resolve(str(copy))) == layout
