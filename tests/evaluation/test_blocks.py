"""Models in pieces: the same numbers as in one, and the weights of one block at a time."""

import numpy as np
import pytest
import torch

from evaluation.assembly import AssembledModel
from evaluation.blocks import Blocks
from evaluation.passes import Passes, gaussian, sampled_labels, text_labels
from evaluation.restarts import Restarts
from quantization.bank import Bank
from quantization.errors import MeasurementError
from tests.conftest import CONFIGS, choices_of

CPU = torch.device("cpu")
CHUNKS = np.random.default_rng(0).integers(2, 300, (2, 40))


@pytest.mark.parametrize("family", CONFIGS)
def test_block_by_block_is_the_whole_model(make_bank, family):
    """Whatever a family passes its blocks: sliding windows, rotations, caps, experts."""
    model = AssembledModel(make_bank(family), CPU)
    passes = Passes(model, CHUNKS)
    passes.forward()
    for ids, states in zip(passes.ids, passes.states[-1], strict=True):
        with torch.no_grad():
            pieces = passes.blocks.logits(ids, states)
    model.assign(None)
    with torch.no_grad():
        whole = model.module(input_ids=passes.ids[-1]).logits[0]
    assert torch.equal(pieces, whole)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_gradients_in_pieces_are_those_of_one_graph(make_bank, family, kept):
    """Whether blocks are computed again on the way back, or their graphs kept."""
    model = AssembledModel(make_bank(family), CPU)
    passes = Passes(model, CHUNKS)
    site = next(u for u in model.bank.layout.units if u.layer == 0).stored[0]
    parameter = model.parameter(site.parameter).requires_grad_(True)

    from contextlib import contextmanager

    @contextmanager
    def watch(index):
        yield [parameter] if index == 0 else []

    passes.forward(watch=watch if kept else None)
    found = {c: g for i, c, g in passes.backward(text_labels, 1, watch) if i == 0}
    model.assign(None)
    for c, ids in enumerate(passes.ids):
        parameter.grad = None
        logits = model.module(input_ids=ids).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:]).backward()
        assert torch.allclose(found[c][0][0], parameter.grad, rtol=1e-4, atol=1e-7)
    parameter.grad = None
    parameter.requires_grad_(False)


def test_only_the_block_at_work_is_loaded(make_bank):
    shared = make_bank("llama")  # whose pages other tests hold
    bank = Bank(shared.checkpoint, shared.layout, shared.quantizer, shared.dtype)
    model = AssembledModel(bank, CPU)
    passes = Passes(model, CHUNKS)
    units = model.bank.layout.units
    inner = [site.parameter for u in units if u.layer is not None for site in u.stored]

    def loaded():
        return {n for n in inner if model.parameter(n).stride() != (0, 0)}

    seen = []

    class Around:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            here = {s.parameter for u in units if u.layer == self.index for s in u.stored}
            assert loaded() == here
            seen.append(self.index)

        def __exit__(self, *_):
            pass

    passes.forward(Around)
    assert seen == [0, 1]
    assert not loaded()
    mapped = [path.name for path in model.bank._maps]
    assert len(mapped) == 1 + len(passes.blocks.outer)  # what lies outside of blocks


def test_restarts_reuse_the_prefix_exactly(make_bank):
    """A loss of a change in the last block equals that of the whole pass from the start."""
    model = AssembledModel(make_bank("qwen3"), CPU)
    choices = choices_of(model.bank.layout)
    restarts = Restarts(model, CHUNKS)
    last = restarts.blocks.units[-1][0]
    schemes = [None] * len(choices)
    schemes[last] = choices[last][0]
    [restarted] = restarts.losses(len(restarts.blocks) - 1, [lambda: model.load([last], schemes)])
    assert restarted == pytest.approx(restarts.loss_of(schemes), rel=1e-6)
    assert restarts.loss() == pytest.approx(0, abs=1e-6)


def test_a_model_that_cant_be_cut_is_refused(make_bank, monkeypatch):
    """Something passed from block to block beside hidden states changes the result."""
    model = AssembledModel(make_bank("llama"), CPU)
    blocks = model.module.model.layers
    inner = type(blocks[0]).forward

    def forward(self, hidden, *args, **kwargs):
        memory = getattr(model.module, "_memory", 0.0)
        model.module._memory = memory + 1.0
        return inner(self, hidden, *args, **kwargs) + memory

    monkeypatch.setattr(type(blocks[0]), "forward", forward)
    with pytest.raises(MeasurementError, match="more than hidden states"):
        Blocks(model)


@pytest.mark.parametrize("probe", [sampled_labels, gaussian])
def test_probes_have_the_fishers_covariance(probe):
    """E[z z^T] = diag(p) - p p^T."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 6, generator=generator).repeat(40000, 1)
    z = probe(logits, torch.zeros(40000, dtype=torch.long), generator).double()
    p = logits[0].double().softmax(-1)
    expected = torch.diag(p) - torch.outer(p, p)
    assert torch.allclose(z.T @ z / len(z), expected, atol=0.01)
    assert torch.allclose(z.mean(0), torch.zeros(6, dtype=torch.double), atol=0.01)
