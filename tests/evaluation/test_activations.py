"""Activations in a format: what layers read, and what comes of it."""

import numpy as np
import pytest
import torch

from evaluation.activations import Activations, quantized
from evaluation.evaluator import Evaluator
from evaluation.passes import Passes
from quantization.activations import ACTIVATIONS
from quantization.adapter import describe
from quantization.bank import Bank
from quantization.errors import MeasurementError, UnknownNameError
from quantization.quantizers import QUANTIZERS
from quantization.schemes import Scheme
from tests.conftest import CONFIGS, choices_of

CPU = torch.device("cpu")
IDS = np.random.default_rng(3).integers(2, 300, 24)
MENU = [Scheme.parse(n) for n in ("bf16/int8-token", "bf16/int4-token", "int8-channel/int8-token")]


@pytest.fixture
def evaluator(make_bank):
    return with_inputs(make_bank("llama"))


def with_inputs(plain):
    bank = Bank(plain.checkpoint, plain.layout, QUANTIZERS["rtn"], torch.float32)
    bank.build(choices_of(plain.layout, MENU))
    return Evaluator(bank, CPU)


def every(layout, scheme):
    return [scheme if unit.kind == "linear" else None for unit in layout.units]


@pytest.mark.parametrize("family", CONFIGS)
def test_each_layer_reads_its_own_rounded_inputs(make_bank, family):
    """Against hooks of our own that round before each product."""
    evaluator = with_inputs(make_bank(family))
    module, layout = evaluator.model.module, evaluator.bank.layout
    evaluator.model.assign(every(layout, Scheme.parse("bf16/int4-token")))
    found = evaluator.hidden(module, IDS)
    evaluator.model.assign(every(layout, Scheme("bf16")))
    sites = [s.name for unit in layout.units if unit.kind == "linear" for s in unit.sites]
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args: (quantized(args[0], "int4-token"), *args[1:])
        )
        for name in sites
    ]
    expected = evaluator.hidden(module, IDS)
    for handle in handles:
        handle.remove()
    assert torch.equal(found, expected)
    assert not torch.equal(found, evaluator.hidden(module, IDS))


def test_rows_are_tokens():
    """A token's scale depends on nobody else."""
    rows = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    rows[0, 2] *= 100
    for name in ACTIVATIONS:
        if ACTIVATIONS[name].refusal((1, 64)):
            continue
        whole = quantized(rows, name)
        alone = torch.stack([quantized(row, name) for row in rows[0]])
        assert torch.equal(whole[0], alone)
    scale = rows[0].abs().amax(-1, keepdim=True) / 127
    expected = (rows[0] / scale).round().clamp(-127, 127) * scale
    torch.testing.assert_close(quantized(rows, "int8-token")[0], expected, rtol=2e-3, atol=2e-2)


def test_a_scheme_lets_go_of_its_inputs(evaluator):
    layout = evaluator.bank.layout
    exact = evaluator.measure([None] * len(layout.units), IDS).kl_sum
    assert evaluator.measure(every(layout, Scheme.parse("bf16/int4-token")), IDS).kl_sum > 0.01
    assert evaluator.measure([None] * len(layout.units), IDS).kl_sum == exact


def test_weights_and_activations_of_a_scheme_are_both_quantized(evaluator):
    layout = evaluator.bank.layout
    names = ("int8-channel", "bf16/int8-token", "int8-channel/int8-token")
    kl = [evaluator.measure(every(layout, Scheme.parse(name)), IDS).kl_sum for name in names]
    assert kl[2] > max(kl[:2])


def test_the_bank_keeps_a_weight_once_whatever_reads_beside_it(evaluator):
    bank = evaluator.bank
    unit = next(unit for unit in bank.layout.units if unit.kind == "linear")
    both = (Scheme("int8-channel"), Scheme.parse("int8-channel/int8-token"))
    first, second = (bank.tensors(unit, scheme) for scheme in both)
    assert {n: t.data_ptr() for n, t in first.items()} == {
        n: t.data_ptr() for n, t in second.items()
    }


def test_blocks_and_whole_passes_agree(evaluator):
    schemes = every(evaluator.bank.layout, Scheme.parse("bf16/int4-token"))
    passes = Passes(evaluator.model, IDS[None], schemes=schemes)
    passes.forward()
    cut = passes.blocks.finish(passes.ids[0], passes.states[-1][0])
    evaluator.model.assign(schemes)
    assert torch.equal(cut.detach(), evaluator.hidden(evaluator.model.module, IDS))


def test_gradients_go_straight_through(evaluator):
    """The gradient by a layer's inputs is that of the product at the rounded ones."""
    layer = evaluator.model.module.model.layers[1].mlp.down_proj
    path = "model.layers.1.mlp.down_proj"
    inputs = evaluator.model.read_inputs()
    evaluator.model.assign(None)
    inputs.formats[path] = "int4-token"
    states = torch.randn(1, 3, 96, requires_grad=True)
    written = {path: []}
    with inputs.watch(written):
        out = layer(states)
    weight = torch.randn(out.shape)
    (gradient,) = torch.autograd.grad((out * weight).sum(), written[path][0].kept)
    torch.testing.assert_close(gradient, weight @ layer.weight)
    torch.testing.assert_close(out, quantized(states.detach(), "int4-token") @ layer.weight.mT)


def test_names():
    known = {"int8-token", "fp8-e4m3-token", "mxfp4", "mxfp8-e5m2", "int4-g128"}
    assert known | {"dialectfp4-b32-online"} < set(ACTIVATIONS)
    assert not {"nvfp4", "fp8-e4m3", "fp8-e4m3-b128", "int8-g64-fp8"} & set(ACTIVATIONS)
    with pytest.raises(UnknownNameError, match="nearest: int8-token"):
        Scheme.parse("int8-channel/int8-tokens")
    with pytest.raises(UnknownNameError, match="unknown activation format 'gguf-q8_0'"):
        Scheme.parse("bf16/gguf-q8_0")


def test_infinite_activations_are_named(llama):
    with pytest.raises(
        MeasurementError, match="activations of a candidate can't be kept in int8-channel"
    ):
        quantized(torch.full((1, 32), torch.nan), "int8-token")
    assert Activations(torch.nn.Module(), describe(llama).__class__((), (), 0)).formats == {}
