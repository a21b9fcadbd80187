"""Exports of the demo model, as a user has them: written, read back by the target, the same loss."""

import numpy as np
import pytest
import torch

from bitfront.demo import demo_model
from engines import Export, load_engine, load_target
from evaluation.evaluator import Evaluator
from quantization.adapter import describe
from quantization.bank import Bank
from quantization.checkpoints import load_tokenizer, resolve
from quantization.precision_map import ModelEntry, build_map
from quantization.quantizers import QUANTIZERS
from quantization.schemes import Scheme
from tests.conftest import choices_of

MENUS = {
    "gguf": ["int4-g32", "gguf-q5_0"],
    "compressed-tensors": ["int4-g64-bf16", "fp8-e4m3-channel"],
    "torchao": ["int4-g64-bf16", "fp8-e4m3-channel"],
}
TEXT = "A language model can be stored and run at many precisions, layer by layer. "


@pytest.fixture(scope="module")
def demo():
    """The model, with the bank of all these formats and a chunk of text."""
    checkpoint = resolve(demo_model())
    layout = describe(checkpoint)
    bank = Bank(checkpoint, layout, QUANTIZERS["rtn"], torch.float32)
    names = dict.fromkeys(name for menu in MENUS.values() for name in menu)
    bank.build(choices_of(layout, [Scheme(name) for name in names]))
    ids = load_tokenizer(checkpoint)(TEXT * 12)["input_ids"][:128]
    return Evaluator(bank, torch.device("cpu")), np.array([ids])


@pytest.mark.parametrize("name", MENUS)
def test_the_demo_model_is_read_back_as_it_was_measured(demo, tmp_path, name):
    """Layers take turns between two formats; the loss is the candidate's, the bytes the predicted."""
    evaluator, chunks = demo
    layout = evaluator.bank.layout
    schemes = [
        Scheme("bf16") if unit.layer is None else Scheme(MENUS[name][unit.layer % 2])
        for unit in layout.units
    ]
    measured = evaluator.measure(schemes, chunks[0])
    kl = measured.kl_sum / measured.tokens
    pairs = [(scheme.weight, scheme.activation) for scheme in schemes]
    entry = ModelEntry(name="demo", weights_hash=evaluator.bank.checkpoint.weights_hash)
    export = Export(build_map(layout, pairs, entry, {}), evaluator, chunks, kl)
    target = load_target(name)
    target.write(export, tmp_path)
    found = target.check(export, tmp_path)
    # llama.cpp rounds activations to 8 bits in each product
    assert found["reloaded_kl"] == pytest.approx(kl, rel=0.05 if name == "gguf" else 0.02)
    assert kl > 0.05
    rules = load_engine("llama.cpp" if name == "gguf" else name)
    stored = sum(
        rules.nbytes(scheme, site.shape)
        for unit, scheme in zip(layout.units, schemes, strict=True)
        for site in unit.stored
    )
    assert found["weight_bytes"] == stored + rules.other_bytes(layout)
