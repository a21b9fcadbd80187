"""All formats: exact bytes, faithful packing. Integers: bounded error, odd shapes."""

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quantization.errors import QuantizationError, UnknownNameError
from quantization.formats import FORMATS
from quantization.packing import pack_bits, packed_bytes, unpack_bits
from quantization.quantizers import QUANTIZERS

RTN = QUANTIZERS["rtn"]
SMALLEST_SCALE = 2.0**-24
# llama.cpp searches codebooks for these, seconds each; test_gguf_formats.py has them
names = st.sampled_from([n for n in FORMATS if not n.startswith(("gguf-iq1", "gguf-iq2"))])
integers = st.sampled_from([n for n in FORMATS if re.fullmatch(r"int\d-(g\d+|channel)(-asym)?", n)])
shapes = st.one_of(
    st.tuples(st.integers(1, 5), st.integers(1, 150)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70)),
    st.tuples(st.integers(1, 3), st.sampled_from([32, 64, 256, 768])),
    st.sampled_from([(64, 48), (2, 64, 32)]),
)


def weights(shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(deadline=None, max_examples=150)
@given(names, shapes, st.integers(0, 2**31))
def test_packed_bytes_equal_predicted_bytes(name, shape, seed):
    assume(FORMATS[name].refusal(shape) is None)
    packed = RTN.quantize(weights(shape, seed), FORMATS[name]).pack()
    assert packed.nbytes == FORMATS[name].nbytes(shape)


@settings(deadline=None, max_examples=100)
@given(names, shapes, st.integers(0, 2**31))
def test_packing_loses_nothing(name, shape, seed):
    assume(FORMATS[name].refusal(shape) is None)
    quantized = RTN.quantize(weights(shape, seed), FORMATS[name])
    codes, grid = FORMATS[name].unpack(quantized.pack())
    assert torch.equal(FORMATS[name].decode(codes, grid), quantized.dequantize())


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 2**31))
def test_bit_streams_round_trip(bits, columns, seed):
    values = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(seed))
    stream = pack_bits(values, bits)
    assert stream.shape == (3, packed_bytes(columns, bits))
    assert torch.equal(unpack_bits(stream, bits, columns).long(), values)


@settings(deadline=None, max_examples=100)
@given(integers, shapes, st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 100.0]))
def test_every_value_goes_to_its_nearest_code(name, shape, seed, scale):
    """None of the format's other codes is nearer, on the grid as it is stored."""
    format = FORMATS[name]
    weight = weights(shape, seed, scale)
    quantized = RTN.quantize(weight, format)
    error = (quantized.dequantize() - weight).abs()
    for code in range(2**format.element.bits):
        other = format.decode(torch.full(shape, code, dtype=torch.int16), quantized.grid)
        # a tie may go either way, and the division by the scale rounds
        assert (error <= (other - weight).abs() + 1e-6 * other.abs()).all()


@settings(deadline=None, max_examples=50)
@given(integers, shapes, st.integers(0, 2**31))
def test_no_value_is_a_step_away(name, shape, seed):
    """The range of each group covers its values: half a step, and a zero point's rounding."""
    format = FORMATS[name]
    weight = weights(shape, seed, 1.0)
    quantized = RTN.quantize(weight, format)
    bits = format.element.bits
    steps = format.spread(quantized.grid["scales"].float(), weight)
    slack = 0.5 + 2**bits * 2**-11 + (0.5 if format.asymmetric else 0)
    assert ((quantized.dequantize() - weight).abs() <= steps * slack + 2**bits * 2.0**-25).all()


@pytest.mark.parametrize("name", ["int4-g64-asym", "mxfp4", "nvfp4", "nf4-g64", "dialectfp4-b32"])
def test_formats_decode_without_a_device(name):
    """On the meta device: what a shape will take is known before there is memory for it."""
    quantized = RTN.quantize(torch.randn(4, 128), FORMATS[name])
    grid = {key: tensor.to("meta") for key, tensor in quantized.grid.items()}
    decoded = FORMATS[name].decode(quantized.codes.to("meta"), grid)
    assert decoded.shape == (4, 128)
    assert decoded.device.type == "meta"


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4-g128", 4.125),
        ("int4-g64", 4.25),
        ("int4-g128-asym", 4.15625),  # b + (16 + b) / G: the handbooks' 4.156
        ("int3-g32", 3.5),
        ("int8-g64-asym", 8.375),
        ("bf16", 16),
    ],
)
def test_effective_bits_of_whole_groups(name, bits):
    assert FORMATS[name].bits_per_weight((256, 1024)) == bits


def test_a_group_that_does_not_divide_leaves_a_shorter_one():
    """576 columns in groups of 128: four whole groups and one of 64, no padded codes."""
    assert FORMATS["int4-g128"].nbytes((1, 576)) == 576 // 2 + 5 * 2


@pytest.mark.parametrize("name", ["ternary-g128", "int4-g128", "int3-g128-asym", "nf4-g128"])
def test_a_shorter_last_group_is_quantized_as_if_alone(name):
    weight = weights((8, 192))
    whole = RTN.quantize(weight, FORMATS[name]).dequantize()
    alone = RTN.quantize(weight[:, 128:].contiguous(), FORMATS[name]).dequantize()
    assert torch.equal(whole[:, 128:], alone)


def test_symmetric_codes_match_the_textbook():
    weight = torch.tensor([[-0.7, 0.1, 0.35, 0.7]])
    quantized = RTN.quantize(weight, FORMATS["int4-channel"])
    signed = quantized.codes - 8
    assert signed.tolist() in ([[-7, 1, 3, 7]], [[-7, 1, 4, 7]])


@pytest.mark.parametrize("name", ["int2-g32", "int4-g64-asym", "int8-channel"])
def test_zeros_and_subnormals_stay_finite_and_small(name):
    for weight in (torch.zeros(2, 64), torch.full((2, 64), 1e-12)):
        values = RTN.quantize(weight, FORMATS[name]).dequantize()
        assert values.abs().max() <= SMALLEST_SCALE


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad):
    weight = torch.ones(2, 32)
    weight[1, 3] = bad
    with pytest.raises(QuantizationError, match="1 of 64 weights"):
        RTN.quantize(weight, FORMATS["int4-g32"])


def test_a_range_beyond_fp16_scales_is_refused_with_a_way_out():
    with pytest.raises(QuantizationError, match="keep this layer in bf16"):
        RTN.quantize(torch.full((1, 32), 1e6), FORMATS["int2-g32"])


@pytest.mark.parametrize("asymmetric", ["", "-asym"])
def test_more_bits_never_hurt(asymmetric):
    weight = weights((64, 256))
    errors = [
        (RTN.quantize(weight, FORMATS[f"int{b}-g64{asymmetric}"]).dequantize() - weight).norm()
        for b in (2, 3, 4, 5, 6, 8)
    ]
    assert errors == sorted(errors, reverse=True)


def test_an_unknown_name_brings_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown format 'int4-g46'.*int4-g64"):
        FORMATS["int4-g46"]
