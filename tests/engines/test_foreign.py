"""Maps of other tools, in the forms that their users have them."""

import json

import pytest
import torch

from engines import gptq, load_target
from engines.foreign import read_map
from engines.gguf_file import tensor_names
from engines.llama_cpp import GGUFFile
from quantization.adapter import describe
from quantization.checkpoints import load_config, resolve
from quantization.errors import ExportError, ModelError
from quantization.schemes import Scheme
from tests.conftest import choices_of
from tests.engines.test_checkpoint_targets import MENUS, mixed_export

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def layout(llama):
    return describe(llama).split()


def linears(layout):
    return [site.name for unit in layout.units for site in unit.sites if unit.layer is not None]


def test_bits_by_layer_are_integers_in_groups_of_64(llama, layout, tmp_path):
    file = tmp_path / "bits.json"
    file.write_text(json.dumps({**dict.fromkeys(linears(layout), 4), QUERY: "nf4-g64"}))
    found = read_map(file, llama, layout)
    assert found.engine is None
    assert found.formats == {**dict.fromkeys(linears(layout), "int4-g64"), QUERY: "nf4-g64"}


def test_our_own_map(llama, make_bank, layout, tmp_path):
    bank = make_bank("llama")
    bank.build(choices_of(bank.layout, [Scheme(name) for name in MENUS["gptq"]]))
    export = mixed_export(bank, MENUS["gptq"])
    (tmp_path / "m.json").write_text(export.precision_map.to_json())
    found = read_map(tmp_path / "m.json", llama, layout)
    assert found.formats[QUERY] == export.precision_map.units[1].scheme.weight


def test_dynamic_rules_in_their_order_and_the_base_for_the_rest(llama, layout, tmp_path):
    """As GPTQModel writes them: patterns, not whole names."""
    rules = {
        r"-:.*layers\.1\.mlp.*": {},
        r"+:.*layers\.1\..*": {"bits": 8},
        r".*k_proj.*": {"bits": 2, "group_size": 32},
    }
    config = {"bits": 4, "group_size": 128, "sym": True, "dynamic": rules}
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    found = read_map(tmp_path / "quantize_config.json", llama, layout)
    assert found.engine == "gptq"
    assert found.formats[QUERY] == "int4-g128"
    assert found.formats["model.layers.0.self_attn.k_proj"] == "int2-g32"
    assert found.formats["model.layers.1.self_attn.k_proj"] == "int8-g128"
    assert found.formats["model.layers.1.mlp.up_proj"] == "bf16"


def test_a_quantized_models_own_configuration(llama, layout, tmp_path):
    formats = {**dict.fromkeys(linears(layout), "int4-g32"), QUERY: "int8-channel"}
    config = {"model_type": "llama", "quantization_config": gptq.config_of(formats)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_map(tmp_path, llama, layout).formats.items() >= formats.items()


def test_mlx_has_free_biases_and_quantizes_embeddings_too(llama, layout, tmp_path):
    """As mlx-lm writes it: the same twice, and only exceptions by name."""
    own = {"group_size": 64, "bits": 4, "mode": "affine", QUERY: {"group_size": 32, "bits": 8}}
    config = {"quantization": {**own, "lm_head": False}, "quantization_config": own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_map(tmp_path, llama, layout)
    assert found.formats[QUERY] == "int8-g32-real"
    assert found.formats["model.layers.1.mlp.up_proj"] == "int4-g64-real"
    assert found.formats["model.embed_tokens"] == "int4-g64-real"
    assert found.formats["lm_head"] == "bf16"


def test_recipes_are_read_back(llama, layout, make_bank, tmp_path):
    bank = make_bank("llama")
    menu = ["int4-g32", "int8-channel", "bf16"]
    bank.build(choices_of(bank.layout, [Scheme(name) for name in menu]))
    export = mixed_export(bank, menu)
    for name in ("auto-round", "modelopt", "llm-compressor"):
        target = load_target(name)
        target.write(export, tmp_path)
        found = read_map(tmp_path / target.file, llama, layout).formats
        assert found[QUERY] == "int4-g32"
        assert found["model.layers.0.mlp.up_proj"] == "bf16"


def test_activations_are_read_where_a_format_stands_for_them(llama, layout, tmp_path):
    """A scale a token is one; static scales and outputs that are quantized are refused."""
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    inputs = {**weights, "strategy": "token", "dynamic": True}

    def written(**more):
        group = {"targets": ["Linear"], "weights": weights, **more}
        config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        return tmp_path

    found = read_map(written(input_activations=inputs), llama, layout)
    assert found.formats[QUERY] == "fp8-e4m3-channel/fp8-e4m3-token"
    static = {**inputs, "strategy": "tensor", "dynamic": False}
    with pytest.raises(ExportError, match="no activation format here stands for"):
        read_map(written(input_activations=static), llama, layout)
    with pytest.raises(ExportError, match="quantizes outputs"):
        read_map(written(output_activations=inputs), llama, layout)


def test_a_cache_is_read_where_the_layout_has_one(llama, layout, tmp_path):
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    config = {
        "quant_method": "compressed-tensors", "kv_cache_scheme": cache,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    found = read_map(tmp_path, llama, layout.with_caches("apart"))
    assert set(found.caches.values()) == {"fp8-e4m3"}
    assert len(found.caches) == 2 * len(layout.cache)
    with pytest.raises(ExportError, match="quantizes the KV cache, and this job leaves it"):
        read_map(tmp_path, llama, layout)


def test_a_tied_embedding_is_read_by_its_name(tiny_folders, tmp_path):
    checkpoint = resolve(str(tiny_folders("qwen3")))
    layout = describe(checkpoint).split()
    (tmp_path / "t.txt").write_text("token_embd=q8_0 .*=q4_0")
    found = read_map(tmp_path / "t.txt", checkpoint, layout).formats
    assert found["model.embed_tokens"] == "gguf-q8_0"
    assert found["model.layers.0.mlp.up_proj"] == "gguf-q4_0"


def test_tensor_types_of_llama_cpp(llama, layout, tmp_path):
    file = tmp_path / "types.txt"
    file.write_text("# ours\nblk\\.0\\.attn_q=q8_0\n.*ffn_down.*=Q5_0\n.*=iq4_nl\n")
    found = read_map(file, llama, layout)
    assert found.engine == "llama.cpp"
    assert found.formats[QUERY] == "gguf-q8_0"
    assert found.formats["model.layers.1.mlp.down_proj"] == "gguf-q5_0"
    assert found.formats["model.layers.1.self_attn.q_proj"] == "gguf-iq4_nl"


def test_a_gguf_file_and_its_list_of_types_say_what_it_was_made_of(llama, layout, tmp_path):
    from quantization.bank import Bank
    from quantization.quantizers import QUANTIZERS

    menu = ["gguf-q4_0", "gguf-q8_0", "bf16"]
    bank = Bank(llama, layout, QUANTIZERS["rtn"], torch.float32)
    bank.build(choices_of(layout, [Scheme(name) for name in menu]))
    export = mixed_export(bank, menu)
    GGUFFile().write(export, tmp_path)
    wanted = {s: u.scheme.weight for u in export.precision_map.units for s in u.sites}
    assert read_map(tmp_path / "model.gguf", llama, layout).formats == wanted
    assert read_map(tmp_path / "tensor-types.txt", llama, layout).formats == wanted


def test_names_are_ggufs(llama):
    name_of = tensor_names(load_config(llama))
    assert name_of(f"{QUERY}.weight") == "blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.json", "[1]", "holds a list"),
        ("a.json", '{"other": 4}', "names no layer of this model .'other' isn't one"),
        ("a.json", json.dumps({QUERY: "int9-g64"}), "'int9-g64', which is neither"),
        ("a.json", '{"quantization_config": {"quant_method": "awq"}}', "quantized by 'awq'"),
        ("a.json", '{"quantization_config": null}', "names no layer of this model"),
        ("a.json", json.dumps({QUERY: 4.5}), "4.5, which is neither"),
        ("a.json", '{"quantization_config": {"quant_method": "gptq"}}', "no configuration of gptq"),
        ("a.txt", "no map at all", "neither JSON nor lines"),
        ("a.txt", ".*=q99_K", "no ggml type 'q99_K'"),
        ("a.txt", "(=q4_0", "is no pattern"),
        ("missing.json", None, "can't read the map"),
        ("bad.gguf", "GGUF", "can't read"),
    ],
)
def test_what_cannot_be_read_is_one_line(llama, layout, tmp_path, name, text, complaint):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(ModelError, match=complaint):
        read_map(file, llama, layout)
