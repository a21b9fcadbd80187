"""Weights read from their files one by one are those that transformers loads."""

import pytest
import torch

from quantization.checkpoints import load_model, resolve
from quantization.weights import open_weights
from tests.conftest import CONFIGS


@pytest.mark.parametrize("family", CONFIGS)
def test_all_weights_are_those_of_the_model(tiny_folders, family):
    """Families whose files differ from the model (experts) are loaded; nobody sees the difference."""
    checkpoint = resolve(str(tiny_folders(family)))
    state = load_model(checkpoint, torch.float32).state_dict()
    weights = open_weights(checkpoint)
    assert set(weights) <= set(state)
    for name, tensor in weights.items():
        assert torch.equal(tensor, state[name])


def test_plain_families_are_not_loaded(tiny_folders, monkeypatch):
    def refuse(*_):
        raise AssertionError("loaded the whole model")

    monkeypatch.setattr("quantization.weights.load_model", refuse)
    assert len(open_weights(resolve(str(tiny_folders("llama"))))) > 10


def test_quantized_checkpoints_are_left_to_transformers(tiny_folders, tmp_path, monkeypatch):
    """Their codes have the model's names and shapes, and mean nothing without their scales."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folders("llama"), tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    asked = []

    def load(checkpoint, dtype):
        asked.append(checkpoint.folder)
        return load_model(resolve(str(tiny_folders("llama"))), dtype)

    monkeypatch.setattr("quantization.weights.load_model", load)
    open_weights(resolve(str(folder)))
    assert len(asked) == 1
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    tensors[name] = tensors[name].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    open_weights(resolve(str(folder)))
    assert len(asked) == 2
