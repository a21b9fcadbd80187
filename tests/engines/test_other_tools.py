"""Exports in the tools that they are for. None of these is a dependency: what isn't installed is
skipped (`pip install --no-deps nvidia-modelopt llmcompressor auto-round mlx mlx-cpu mlx-lm`, and
what they ask for)."""

import os
import subprocess

import pytest
import torch
import transformers
import yaml

from engines import Export, load_target
from engines.mlx import load_dense
from evaluation.evaluator import Evaluator
from quantization.adapter import describe
from quantization.bank import Bank
from quantization.checkpoints import resolve
from quantization.precision_map import ModelEntry, build_map
from quantization.quantizers import QUANTIZERS
from quantization.schemes import Scheme
from tests.conftest import choices_of, make_tokenizer, save_tiny, tiny_config
from tests.engines.test_checkpoint_targets import mixed_export
from tests.engines.test_exports import CHUNKS
from tests.engines.test_recipes import map_of

ATTENTION, MLP = [f"self_attn.{w}_proj" for w in "qkvo"], ["gate_proj", "up_proj", "down_proj"]


def recipe_of(name, formats, folder):
    """A map of two blocks, attention and MLP each in one format, written for a tool."""
    chosen = {"lm_head": "bf16"}
    for i in range(2):
        attention, mlp = formats[2 * i : 2 * i + 2]
        chosen |= {f"model.layers.{i}.{leaf}": attention for leaf in ATTENTION}
        chosen |= {f"model.layers.{i}.mlp.{leaf}": mlp for leaf in MLP}
    target = load_target(name)
    target.write(Export(map_of(chosen)), folder)
    return folder / target.file


def tiny_llama():
    return transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))


def test_model_optimizer_quantizes_as_it_is_told(tmp_path):
    mtq = pytest.importorskip("modelopt.torch.quantization")
    file = recipe_of("modelopt", ["int4-g32", "int8-channel", "nvfp4", "bf16"], tmp_path)
    model = tiny_llama()
    ids = torch.zeros((1, 4), dtype=torch.long)
    mtq.quantize(model, yaml.safe_load(file.read_text()), lambda m: m(ids))

    def told(name):
        quantizer = model.get_submodule(name).weight_quantizer
        blocks = quantizer.block_sizes or {}
        return quantizer.is_enabled, quantizer.num_bits, blocks.get(-1)

    assert told("model.layers.0.self_attn.k_proj") == (True, 4, 32)
    assert told("model.layers.0.mlp.down_proj") == (True, 8, None)
    assert told("model.layers.1.self_attn.q_proj") == (True, (2, 1), 16)
    assert not told("model.layers.1.mlp.up_proj")[0]
    assert not told("lm_head")[0]
    assert not model.get_submodule("model.layers.0.mlp.up_proj").input_quantizer.is_enabled


def test_llm_compressor_reads_the_recipe(tmp_path):
    recipes = pytest.importorskip("llmcompressor.recipe")
    file = recipe_of("llm-compressor", ["int4-g64", "int8-channel", "fp8-e4m3", "bf16"], tmp_path)
    (modifier,) = recipes.Recipe.create_instance(str(file)).modifiers
    found = {
        name: (group["weights"]["num_bits"], group["weights"]["type"])
        for group in (
            g if isinstance(g, dict) else g.model_dump() for g in modifier.config_groups.values()
        )
        for name in group["targets"]
    }
    assert found["model.layers.0.self_attn.v_proj"] == (4, "int")
    assert found["model.layers.0.mlp.gate_proj"] == (8, "int")
    assert found["model.layers.1.self_attn.o_proj"] == (8, "float")
    assert "model.layers.1.mlp.gate_proj" in modifier.ignore


def test_auto_round_quantizes_as_it_is_told(tmp_path, monkeypatch):
    auto_round = pytest.importorskip("auto_round")
    monkeypatch.chdir(tmp_path)  # it keeps files where it stands
    file = recipe_of("auto-round", ["int4-g32", "int8-channel", "int2-g32", "bf16"], tmp_path)
    rounding = auto_round.AutoRound(
        tiny_llama(), make_tokenizer(), scheme="W4A16", iters=0, nsamples=2, seqlen=16,
        layer_config=yaml.safe_load(file.read_text()), disable_opt_rtn=True,
    )  # fmt: skip
    found = rounding.quantize()
    model = found[0] if isinstance(found, tuple) else found

    def told(name):
        module = model.get_submodule(name)
        return module.bits, module.group_size

    assert told("model.layers.0.self_attn.q_proj") == (4, 32)
    assert told("model.layers.0.mlp.up_proj") == (8, -1)
    assert told("model.layers.1.self_attn.v_proj") == (2, 32)
    assert told("model.layers.1.mlp.down_proj")[0] == 16
    assert told("lm_head")[0] == 16


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "mixtral"])
def test_mlx_lm_computes_what_was_measured(make_bank, tmp_path, family):
    """Of several formats, a quantized embedding, which is the head as well, and experts."""
    mlx_lm = pytest.importorskip("mlx_lm")
    import mlx.core as mx

    bank = make_bank(family)
    names = ["int4-g32-bf16", "int3-g32-bf16", "int6-g32-bf16", "int8-g32-bf16"]
    schemes = [Scheme(names[i % len(names)]) for i in range(len(bank.layout.units))]
    bank.build([[scheme] for scheme in schemes])
    pairs = [(scheme.weight, "bf16") for scheme in schemes]
    entry = ModelEntry(name="tiny", weights_hash="0" * 64)
    evaluator = Evaluator(bank, torch.device("cpu"))
    target = load_target("mlx")
    target.write(Export(build_map(bank.layout, pairs, entry, {}), evaluator, CHUNKS, 0.0), tmp_path)
    model, _ = mlx_lm.load(str(tmp_path))
    model.set_dtype(mx.float32)
    found = torch.tensor(model(mx.array(CHUNKS[:1])).tolist())
    with torch.inference_mode():
        wanted = load_dense(tmp_path, torch.float32)(torch.from_numpy(CHUNKS[:1])).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


LOADED = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
found = GPTQModel.load(sys.argv[1], device="cpu", backend=BACKEND.TORCH, dtype=torch.bfloat16).model
torch.save(found(torch.load(sys.argv[2])).logits.detach().float(), sys.argv[3])
"""


@pytest.mark.skipif(
    "BITFRONT_GPTQMODEL" not in os.environ,
    reason="$BITFRONT_GPTQMODEL names no Python of an environment with GPTQModel",
)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_gptqmodel_computes_what_was_measured(tmp_path, family):
    """Layers of 2, 3, 4 and 8 bits in one checkpoint, and experts."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    more = {"moe_intermediate_size": 128} if family == "qwen3_moe" else {}
    folder = save_tiny(family, tmp_path / "model", **sizes, **more)
    checkpoint = resolve(str(folder))
    bank = Bank(checkpoint, describe(checkpoint), QUANTIZERS["rtn"], torch.float32)
    menu = ["int4-g32", "int8-g32", "int3-g32", "int2-g32"]
    bank.build(choices_of(bank.layout, [Scheme(name) for name in [*menu, "bf16"]]))
    export = mixed_export(bank, menu)
    (made := tmp_path / "made").mkdir()
    load_target("gptq").write(export, made)
    ids = torch.from_numpy(CHUNKS[:1])
    torch.save(ids, tmp_path / "ids.pt")
    places = [str(made), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    python = os.environ["BITFRONT_GPTQMODEL"]
    subprocess.run([python, "-c", LOADED, *places], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "logits.pt")[0].log_softmax(-1)
    own = export.evaluator.logits(export.precision_map.schemes, CHUNKS[0]).log_softmax(-1)
    kl = float((own.exp() * (own - found)).sum(-1).mean())
    assert kl < 0.05 * export.measured_kl
