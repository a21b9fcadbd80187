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
