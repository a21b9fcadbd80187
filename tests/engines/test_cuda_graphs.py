"""Work in CUDA graphs is the work that Python queues, and its time is the GPU's."""

import pytest
import torch

from engines.cuda_graphs import ROOM, WARM_UPS, Captured, GraphModel
from engines.torch_kernels import _packed
from quantization.adapter import describe
from quantization.schemes import Scheme

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
ROUNDING = 0.02
"""Of bfloat16 in another order of operations, over the norm."""


def relative(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_a_replay_is_the_product_of_what_the_inputs_hold_now():
    x, w = torch.randn(16, 512, device="cuda"), torch.randn(512, 512, device="cuda")
    product = Captured(lambda: x @ w)
    assert product.graph is not None
    x.copy_(torch.randn_like(x))
    product()
    torch.testing.assert_close(product.result, x @ w)


def test_seconds_are_the_gpus_and_grow_with_the_work():
    x, w = (torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    one, four = Captured(lambda: x @ w), Captured(lambda: [x @ w for _ in range(4)])
    assert 3 < four.seconds(0.02) / one.seconds(0.02) < 5


def test_what_cannot_be_captured_is_run():
    x = torch.randn(8, device="cuda")
    asked = Captured(lambda: x.sum().item())  # waits for the GPU, which no graph can
    assert asked.graph is None
    assert asked.seconds() > 0


@torch.inference_mode()
def test_a_token_in_a_graph_is_the_token(llama):
    layout = describe(llama).split()
    schemes = [Scheme("bf16" if u.layer is None else "int8-channel") for u in layout.units]
    module = _packed(llama, layout, schemes)
    model = GraphModel(module)
    model.prefill(16)
    assert model._prompt(16).graph is not None
    ids = model._ids(16)
    whole = module(input_ids=ids).logits[:, -1:]
    assert relative(model._prompt(16).result.logits, whole) < ROUNDING
    for warmed in (WARM_UPS, 0):  # a second start finds the graph and an emptied cache
        model.start(16)
        model.step()
        before = ROOM - model._left - 1
        assert before == warmed
        token = torch.full((1, before + 1), 10, device="cuda")
        expected = module(input_ids=torch.cat([ids, token], 1)).logits[:, -1:]
        assert model._step.graph is not None
        assert relative(model._step.result.logits, expected) < ROUNDING
        other = module(input_ids=torch.cat([ids, token, token], 1)).logits[:, -1:]
        assert relative(other, expected) > ROUNDING
    for _ in range(2 * ROOM):  # goes on when the cache is full
        model.step()
    assert model.step_s() > 0
