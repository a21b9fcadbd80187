"""Packed weights in models: the same results from fewer bytes."""

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from quantization.formats import FORMATS
from quantization.kernels.operator import dequantized, simulation
from quantization.kernels.packed_weight import PackedWeight
from tests.conftest import tiny_config

# llama.cpp searches codebooks for these, seconds each, and wants an importance matrix
QUICK = [n for n in FORMATS if not n.startswith(("gguf-iq1", "gguf-iq2"))]
IDS = torch.arange(24).view(2, 12)


def pack(name, weight):
    format = FORMATS[name]
    return format.pack(*format.nearest(weight.detach().float()))


def stack(name="int4-g32", shape=(4, 32, 64), dtype=torch.float32):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(PackedWeight(pack(name, weight), dtype), requires_grad=False)


def model_of(family, dtype=torch.float32):
    torch.manual_seed(0)
    config = tiny_config(family)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def replaced(model, name, make):
    """The model with each matrix and stack of its blocks in a format, as `make` puts it."""
    for path, module in model.model.layers.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() > 1 and "norm" not in path:
                new = make(pack(name, parameter), parameter.dtype)
                module._parameters[leaf] = nn.Parameter(new, requires_grad=False)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("int3-g32", torch.float32), ("int8-channel", torch.bfloat16)]
)
def test_models_compute_the_same_from_packed_weights(family, name, dtype):
    def plain(packed, dtype):
        return dequantized(packed).to(dtype)

    with torch.inference_mode(), simulation():
        expected = replaced(model_of(family, dtype), name, plain)(IDS).logits
        result = replaced(model_of(family, dtype), name, PackedWeight)(IDS).logits
    assert torch.equal(result, expected)


def test_kernels_change_logits_by_rounding_alone():
    model = replaced(model_of("llama"), "int8-channel", PackedWeight)
    with torch.inference_mode():
        fast = model(IDS).logits
        with simulation():
            simulated = model(IDS).logits
    assert not torch.equal(fast, simulated), "no kernel ran"
    torch.testing.assert_close(fast, simulated, rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(QUICK), st.integers(0, 2))
def test_one_matrix_of_a_stack_is_packed_and_its_own(name, index):
    shape = (3, 32, 512)
    assume(FORMATS[name].refusal(shape) is None)
    whole = stack(name, shape)
    one = whole[index]
    assert torch.equal(torch.as_tensor(one + 0), whole.dequantize()[index])
    if isinstance(one, PackedWeight):
        assert one.packed.nbytes == FORMATS[name].nbytes(shape[1:])
        assert whole[index].packed is one.packed  # what is repacked for it is found again


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_no_linear_layer_sees_plain_values(mode):
    whole, x = stack(), torch.randn(3, 64)
    plain = whole.dequantize()
    with mode(), simulation():
        for result, expected in (
            (functional.linear(x, whole[2]), functional.linear(x, plain[2])),
            (x @ whole[1].t(), x @ plain[1].t()),
            (functional.embedding(IDS[0], whole[1]), functional.embedding(IDS[0], plain[1])),
            (torch.einsum("nk,ek->ne", x, whole[3]), torch.einsum("nk,ek->ne", x, plain[3])),
            (whole[:, :2], plain[:, :2]),
            (torch.stack([whole[0], whole[1]]), plain[:2]),
        ):
            assert type(result) is torch.Tensor
            assert torch.equal(result, expected)


def test_a_transposed_weight_has_its_models_shape():
    packed = pack("int4-g32", torch.randn(32, 64))
    weight = PackedWeight(packed, torch.float32, transposed=True)
    assert weight.shape == (64, 32)
    assert torch.equal(weight + 0, dequantized(packed).T)
    x = torch.randn(3, 32)
    assert torch.equal(functional.linear(x, weight), functional.linear(x, dequantized(packed).T))


def test_weights_keep_their_bytes_wherever_they_go():
    weight = stack()
    assert isinstance(weight, nn.Parameter)
    for moved in (weight.to(torch.bfloat16), weight.detach(), weight.clone(), weight.cpu()):
        assert isinstance(moved, PackedWeight)
        assert moved.packed_bytes == FORMATS["int4-g32"].nbytes((4, 32, 64))
        assert torch.equal(moved.dequantize().float(), weight.dequantize().to(moved.dtype).float())
    with torch.inference_mode():
        assert weight.to(torch.bfloat16).dtype == torch.bfloat16
    layer = nn.Linear(64, 32)
    layer._parameters["weight"] = nn.Parameter(weight[0].detach(), requires_grad=False)
    layer.to(torch.bfloat16)
    assert isinstance(layer.weight, PackedWeight)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
