"""Exports: reloaded by the target's own loader, equal to what was measured, or refused."""

import json

import numpy as np
import pytest
import torch
import transformers

from engines import TARGETS, Export, load_target
from engines.safetensors_checkpoint import SafetensorsCheckpoint
from evaluation.evaluator import Evaluator
from quantization.errors import ExportError, UnknownNameError
from quantization.precision_map import ModelEntry, build_map
from tests.conftest import MENU

CHUNKS = np.random.default_rng(0).integers(2, 300, (3, 32))


def export_of(bank, scheme=MENU[0]):
    evaluator = Evaluator(bank, torch.device("cpu"))
    schemes = [
        (scheme.weight if unit.layer is not None else "bf16", "bf16") for unit in bank.layout.units
    ]
    names = build_map(bank.layout, schemes, ModelEntry(name="tiny", weights_hash="0" * 64), {})
    from quantization.schemes import Scheme

    losses = [evaluator.measure([Scheme(*pair) for pair in schemes], ids) for ids in CHUNKS]
    kl = sum(loss.kl_sum for loss in losses) / sum(loss.tokens for loss in losses)
    return Export(names, evaluator, CHUNKS, kl)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_checkpoint_reloads_with_the_measured_loss(make_bank, tmp_path, family, dtype):
    """Tied heads, capped logits and packed experts included."""
    export = export_of(make_bank(family, dtype))
    target = SafetensorsCheckpoint()
    target.write(export, tmp_path)
    found = target.check(export, tmp_path)
    assert found["reloaded_kl"] == pytest.approx(export.measured_kl, rel=0.01)


def test_transformers_loads_the_candidates_exact_weights(make_bank, tmp_path):
    export = export_of(make_bank("llama"))
    SafetensorsCheckpoint().write(export, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    bank = export.evaluator.bank
    for unit in (u for u in bank.layout.units if u.layer is not None):
        for site in unit.sites:
            stored = bank.tensors(unit, MENU[0])[site.parameter]
            assert torch.equal(model.get_parameter(site.parameter), stored)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"]


def test_a_reload_that_differs_is_refused(make_bank, tmp_path):
    export = export_of(make_bank("llama"))
    target = SafetensorsCheckpoint()
    target.write(export, tmp_path)
    wrong = Export(export.precision_map, export.evaluator, CHUNKS, 2 * export.measured_kl)
    with pytest.raises(ExportError, match="nothing was exported"):
        target.check(wrong, tmp_path)


def test_the_neutral_map_names_every_site(make_bank, tmp_path):
    export = export_of(make_bank("llama"))
    target = load_target("map")
    target.write(export, tmp_path)
    assert target.check(export, tmp_path) == {"map_hash": export.precision_map.map_hash}
    document = json.loads((tmp_path / "precision_map.json").read_text())
    sites = [site for unit in document["units"] for site in unit["sites"]]
    assert "model.layers.1.mlp.down_proj" in sites
    assert len(sites) == len(set(sites)) == 2 + 2 * 7


def test_an_unknown_target_brings_the_nearest():
    assert {"map", "safetensors", "gguf"} < set(TARGETS)
    with pytest.raises(UnknownNameError, match="nearest: safetensors"):
        load_target("safetensor")
