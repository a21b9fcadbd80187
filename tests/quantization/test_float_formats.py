"""Floats, microscaling, NVFP4, tables: against torch's own types, ggml's decoder and the OCP text."""

import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantization.errors import QuantizationError
from quantization.formats import FORMATS
from quantization.formats.elements import E2M1, E2M3, E3M2, E4M3, E5M2, NF4, MiniFloat
from quantization.quantizers import QUANTIZERS

RTN = QUANTIZERS["rtn"]
finite = st.floats(-1e6, 1e6, width=32)


def quantized(name, values):
    return RTN.quantize(torch.as_tensor(values, dtype=torch.float32), FORMATS[name])


@pytest.mark.parametrize(
    ("element", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)]
)
@settings(deadline=None)
@given(values=st.lists(finite, min_size=1, max_size=50))
def test_fp8_rounds_as_torch_does(element, dtype, values):
    x = torch.tensor(values)
    expected = x.clamp(-element.largest, element.largest).to(dtype)
    assert torch.equal(element.decode(element.encode(x)), expected.float())
    assert torch.equal(element.encode(x).to(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    ("element", "count", "smallest", "largest"),
    [(E2M1, 8, 0.5, 6.0), (E2M3, 32, 0.125, 7.5), (E3M2, 32, 0.0625, 28.0)],
)
def test_levels_are_the_specification_s(element, count, smallest, largest):
    """OCP MX v1.0, tables 3 to 5: no pattern is reserved below 8 bits."""
    positive = element.levels[:count]
    assert (positive.diff() > 0).all()
    assert positive[0] == 0
    assert positive[1] == smallest
    assert positive[-1] == largest


@pytest.mark.parametrize("element", [E2M1, E2M3, E3M2, E4M3, E5M2])
def test_ties_go_to_the_even_pattern(element):
    levels = element.levels[: 2 ** (element.bits - 1)]
    levels = levels[levels.isfinite()]
    middles = (levels[1:] + levels[:-1]) / 2
    codes = element.encode(middles)
    assert (codes % 2 == 0).all()
    assert torch.equal(element.encode(-middles) - 2 ** (element.bits - 1), codes)


def ocp_block(values, element, emax):
    """Section 6.3 in exact arithmetic: shared exponent, then nearest level, ties to even."""
    top = max(abs(v) for v in values)
    exponent = (math.frexp(top)[1] - 1 if top >= 2.0**-126 else -127) - emax
    scale = 2.0 ** min(max(exponent, -127), 127)
    table = [(float(v), i) for i, v in enumerate(element.levels) if math.isfinite(v)]

    def nearest(x):
        return min(table, key=lambda t: (abs(t[0] - x), t[1] % 2, t[0] == 0 and t[1] > 0))[0]

    return [nearest(v / scale) * scale for v in values]


@pytest.mark.parametrize(
    ("name", "element"),
    [("mxfp4", E2M1), ("mxfp6", E3M2), ("mxfp6-e2m3", E2M3), ("mxfp8", E4M3), ("mxfp8-e5m2", E5M2)],
)
@settings(deadline=None, max_examples=30)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=32, max_size=32),
    power=st.integers(-90, 0),
)
def test_microscaling_follows_the_specification(name, element, values, power):
    x = (torch.tensor([values], dtype=torch.float64) * 2.0**power).float()
    found = quantized(name, x).dequantize()
    expected = torch.tensor(ocp_block(x[0].tolist(), element, element.emax))
    assert torch.equal(found[0], expected.float())


@settings(deadline=None, max_examples=50)
@given(st.lists(finite, min_size=32, max_size=32))
def test_mxint8_is_two_s_complement_with_six_fraction_bits(values):
    q = quantized("mxint8", [values])
    scale = 2.0 ** (q.grid["scales"].item() - 127)
    raw = q.codes.to(torch.uint8).view(torch.int8).double()
    assert torch.equal((raw / 64 * scale).float(), q.dequantize())
    assert raw.min() >= -127
    exact = torch.tensor(values, dtype=torch.float64)
    assert ((q.dequantize()[0] - exact).abs() <= scale / 64).all()  # the top may saturate


def test_mxfp4_bytes_mean_the_same_to_ggml():
    """ggml keeps an exponent byte and 16 bytes of nibbles, the second half of the block high."""
    q = quantized("mxfp4", torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    blocks = q.codes.reshape(-1, 32).numpy().astype(np.uint8)
    nibbles = blocks[:, :16] | blocks[:, 16:] << 4
    raw = np.concatenate([q.grid["scales"].reshape(-1, 1).numpy(), nibbles], axis=1)
    values = gguf.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(values.reshape(8, 64), q.dequantize().numpy())


def test_nvfp4_uses_the_whole_range_of_its_scales():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    q = quantized("nvfp4", weight)
    assert q.grid["scales"].float().max() == 448
    assert q.grid["tensor_scale"].item() == pytest.approx(weight.abs().max().item() / (6 * 448))
    assert FORMATS["nvfp4"].nbytes((16, 256)) == 16 * 256 // 2 + 16 * 16 + 4


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "dialectfp4-b32"])
def test_blocks_that_do_not_divide_are_refused(name):
    assert "don't divide" in FORMATS[name].refusal((4, 40))
    assert FORMATS[name].refusal((4, 64)) is None


def test_fp8_tiles_have_a_scale_each():
    weight = torch.ones(130, 200)
    weight[129, 199] = 1000
    q = quantized("fp8-e4m3-b128", weight)
    assert q.grid["scales"].shape == (2, 2)
    assert q.dequantize()[0, 0] == 1
    assert FORMATS["fp8-e4m3-b128"].nbytes((130, 200)) == 130 * 200 + 4 * 4


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mxfp4", 4.25), ("mxfp6", 6.25), ("mxfp8", 8.25), ("mxint8", 8.25),
        ("int4-g64-fp8", 4 + 8 / 64 + 32 / 2**20), ("nvfp4", 4.5 + 32 / 2**20),
        ("int4-g64-bf16", 4.25), ("int4-g64-e8m0", 4.125), ("int4-g64-real", 4.5),
        ("nf4-g64", 4.25), ("fp6-e3m2-g64", 6.25), ("ternary-g64", 205 / 1024 * 8 + 0.25),
        # 3-bit scales and zero points of 16, float16 step and minimum of 16 scales: SpQR's 3.625
        ("int3-g16-asym-spqr", 3 + 6 / 16 + 32 / 256),
        ("squeezellm4", 4 + 16 * 16 / 1024),
        ("squeezellm4@0.45%", 4 + 16 * 16 / 1024 + 8 * (4 * 4719 + 4 * 1025) / 2**20),
        ("dialectfp4-b16", 4.5625), ("dialectfp4-b32", 4.28125), ("dialectfp4-b64", 4.140625),
        ("fgmp@30%", 0.3 * 8 + 0.7 * 4.5 + 1 / 16),
    ],
)  # fmt: skip
def test_effective_bits(name, bits):
    assert FORMATS[name].bits_per_weight((1024, 1024)) == pytest.approx(bits, rel=1e-4)


def test_normalfloat_is_the_paper_s_table():
    """Zero and both ends exact, the positive half one level richer (QLoRA, appendix E)."""
    assert NF4.values[0] == -1
    assert NF4.values[7] == 0
    assert NF4.values[15] == 1
    q = quantized("nf4-g64", torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
    assert q.codes.min() >= 0
    assert q.codes.max() == 15


def test_power_of_two_scales_never_cut_an_integer():
    """Unlike microscaling's, whose largest values may saturate."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    q = quantized("int4-g32-e8m0", weight)
    scales = FORMATS["int4-g32-e8m0"].scale.load(q.grid)
    assert (weight.unflatten(-1, (-1, 32)).abs().amax(-1) <= 7 * scales).all()


def test_every_minifloat_survives_its_own_round_trip():
    for element in (E2M1, E2M3, E3M2, E4M3, E5M2, MiniFloat(5, 2, 57344.0)):
        levels = element.levels[element.levels.isfinite()]
        assert torch.equal(element.decode(element.encode(levels)), levels)


def test_a_range_beyond_the_scales_is_refused():
    for name in ("int3-g16-spqr", "dialectfp4-b32", "nf4-g32"):
        with pytest.raises(QuantizationError, match="keep this layer in bf16"):
            quantized(name, torch.full((1, 64), 1e9))
