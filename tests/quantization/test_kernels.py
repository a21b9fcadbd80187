"""Kernels: what they compute from packed bytes is what the reference computes from weights.

Without a GPU, Triton's interpreter runs its kernels on the CPU, and its compiler shows that they
compile for the GPUs that they name.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from quantization.formats import FORMATS, Packed
from quantization.kernels import KERNELS, kernel_devices
from quantization.kernels.base import Product
from quantization.kernels.operator import (
    dequantized,
    kernel_for,
    packed_linear,
    reference,
    simulation,
)
from quantization.kernels.recipe import recipe
from quantization.kernels.torch_cpu import repacked_bytes
from quantization.kernels.triton_split import parts_for

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# weight and result are rounded once each, half an eps; Triton's interpreter truncates to bfloat16.
# In float32 the order of sums counts, and that zero points are taken out of them.
SLACK = {torch.float16: 1, torch.bfloat16: 1 if torch.cuda.is_available() else 2, torch.float32: 32}
DECODE, PREFILL, _ = KERNELS["cuda"]
# llama.cpp searches codebooks for these, seconds each, and wants an importance matrix
QUICK = [n for n in FORMATS if not n.startswith(("gguf-iq1", "gguf-iq2"))]
WITH_RECIPE = [name for name in FORMATS if recipe(FORMATS[name])]
ELEMENTS = [
    *(f"int{bits}-g16-asym" for bits in (2, 3, 4, 5, 6, 8)),
    *(f"int{bits}-g{group}" for bits in (3, 4) for group in (16, 32, 64, 128)),
    "int2-channel", "int5-channel-asym", "int7-g32", "int4-g64-bf16", "int6-g128-asym-fp8", "int3-g32-e8m0",
    "int4-g64-real", "fp8-e4m3", "fp8-e5m2-channel", "fp8-e4m3-b128", "fp8-e5m2-b128",
    "fp6-e3m2-g32", "fp6-e2m3-channel", "fp4-e2m1-g16", "mxfp4", "mxfp6", "mxfp6-e2m3", "mxfp8",
    "mxfp8-e5m2", "mxint8", "nvfp4", "nf4-g64", "nf4-channel", "squeezellm3", "squeezellm4",
    "dialectfp4-b16", "dialectfp4-b64",
]  # fmt: skip
shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 150)),
    st.tuples(st.integers(1, 20), st.sampled_from([64, 192, 256, 640])),
)
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def _unwritten_results_are_nan():
    """Deterministic mode fills what `empty` returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pack(name, shape, seed=0) -> Packed:
    format = FORMATS[name]
    return format.pack(*format.nearest(random(shape, seed)))


def poisoned(tensor, shift=0):
    """The same values between NaN (or ones, as bits), `shift` bytes away from alignment."""
    itemsize, flat = tensor.element_size(), tensor.contiguous().view(-1).view(torch.uint8)
    room = torch.full((flat.numel() + 256,), 0xFF, dtype=torch.uint8)
    inside = room[64 + shift * itemsize :][: flat.numel()]
    inside.copy_(flat)
    return inside.view(tensor.dtype).view(tensor.shape).to(DEVICE)


def with_poisoned_padding(packed, shift):
    """Bits behind a row's last code set, and every tensor between poison."""
    tensors = {name: poisoned(tensor, shift) for name, tensor in packed.tensors.items()}
    bits = recipe(FORMATS[packed.format]).bits
    unused = 8 * tensors["codes"].shape[-1] - packed.shape[-1] * bits
    tensors["codes"][..., -1] |= 256 - 2 ** (8 - unused)
    return Packed(packed.format, packed.shape, tensors)


def assert_close(result, x, packed, bias, slack):
    """Within `slack` roundings of the activations' dtype of the exact product."""
    w, x, offset = dequantized(packed).double(), x.double(), 0 if bias is None else bias.double()
    exact, size = x @ w.T + offset, x.abs() @ w.abs().T + abs(offset)
    limit = slack * torch.finfo(result.dtype).eps * size + torch.finfo(result.dtype).tiny
    assert result.isfinite().all()
    assert ((result.double() - exact).abs() <= limit).all()


def check(kernel, name, shape, batch, dtype, seed, shift=0):
    packed = pack(name, shape, seed)
    x = poisoned(random((batch, shape[1]), seed + 1, dtype))
    bias = poisoned(random(shape[:1], seed + 2, dtype)) if seed % 2 else None
    result = kernel.run(x, with_poisoned_padding(packed, shift), bias)
    assert (result.shape, result.dtype) == ((batch, shape[0]), dtype)
    cpu = None if bias is None else bias.cpu()
    assert_close(result.cpu(), x.cpu(), packed, cpu, SLACK[dtype])


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(QUICK), shapes, st.sampled_from(DTYPES), seeds)
def test_the_reference_is_the_dequantized_model_bit_for_bit(name, shape, dtype, seed):
    assume(FORMATS[name].refusal(shape) is None)
    packed, x = pack(name, shape, seed), random((2, 3, shape[1]), seed, dtype)
    expected = functional.linear(x, dequantized(packed).to(dtype))
    with simulation():
        assert torch.equal(packed_linear(x, packed), expected)
    assert torch.equal(reference(x, packed), expected)


@pytest.mark.parametrize("name", ["int8-channel", "int3-g16-spqr", "squeezellm4"])
def test_the_operator_is_one_that_torch_can_trace(name):
    packed, x = pack(name, (16, 64)), random((3, 64))
    names = sorted(packed.tensors)
    parts = [packed.tensors[n] for n in names]
    arguments = (x, parts, names, name, [16, 64], random((16,)))
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.bitfront.packed_linear.default, arguments, test_utils=utilities)


def test_an_empty_batch_gives_an_empty_result():
    assert packed_linear(torch.zeros(2, 0, 64), pack("int8-channel", (16, 64))).shape == (2, 0, 16)


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize(("kernel", "batch"), [(DECODE, 3), (PREFILL, 5)])
def test_triton_agrees_with_the_reference_for_every_kind_of_format(kernel, batch, name):
    ragged = FORMATS[name].refusal((9, 145)) is None
    check(kernel, name, (9, 145 if ragged else 320), batch, torch.float32, seed=1)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(WITH_RECIPE), shapes, st.integers(1, 17), st.sampled_from(DTYPES),
    st.booleans(), seeds,
)  # fmt: skip
def test_triton_agrees_for_any_shape_and_batch(name, shape, batch, dtype, odd, seed):
    assume(FORMATS[name].refusal(shape) is None)
    kernel = DECODE if batch <= 4 else PREFILL
    check(kernel, name, shape, batch, dtype, seed, shift=int(odd))


@pytest.mark.parametrize("name", ELEMENTS)
def test_prefill_multiplies_the_references_weights_bit_for_bit(name):
    """The product with the identity in float32 is the weight itself."""
    packed = pack(name, (8, 64))
    values = PREFILL.run(torch.eye(64, device=DEVICE), with_poisoned_padding(packed, 0), None)
    assert torch.equal(values.cpu().T, dequantized(packed))


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "int3-g32-e8m0"])
@pytest.mark.parametrize("exponent", [0, 1, 250])
def test_powers_of_two_reach_from_subnormal_to_huge(name, exponent):
    packed = pack(name, (8, 64))
    packed.tensors["scales"].fill_(exponent)
    packed.tensors["codes"].zero_()
    packed.tensors["codes"][:, ::3] = 1  # codes 0 and 1: finite under any scale
    values = PREFILL.run(torch.eye(64, device=DEVICE), with_poisoned_padding(packed, 0), None)
    assert torch.equal(values.cpu().T, dequantized(packed))


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 20000), st.sampled_from([128, 256, 1024]))
def test_parts_cover_all_columns_once(tiles, columns, step):
    parts, each = parts_for(tiles, columns, step, CPU)
    assert each % step == 0
    assert (parts - 1) * each < columns <= parts * each


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("int4-g64", ["cuda sm80+", "cpu"]),
        ("int4-g16", ["cuda sm80+"]),
        ("int8-channel-asym", ["cuda sm80+"]),
        ("mxfp4", ["cuda sm80+"]),
        ("ternary-g64", []),
        ("bf16", []),
    ],
)
def test_formats_know_their_devices(name, devices):
    assert kernel_devices(FORMATS[name], (1024, 1024)) == devices


def test_odd_shapes_have_the_same_devices():
    assert kernel_devices(FORMATS["int4-g64"], (7, 101)) == ["cuda sm80+", "cpu"]


def test_asking_for_devices_imports_no_triton():
    ask = (
        "import sys; from quantization.formats import FORMATS;"
        "from quantization.kernels import kernel_devices;"
        "assert kernel_devices(FORMATS['int4-g64'], (64, 64)); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", ask], check=True)


cpu_names = [
    n
    for n in FORMATS
    if FORMATS[n].family == "integer" and any(k.supports(FORMATS[n]) for k in KERNELS["cpu"])
]


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(cpu_names), st.integers(1, 40), st.integers(1, 20), st.sampled_from([1, 7, 64]),
    st.integers(1, 17), st.sampled_from(DTYPES), seeds,
)  # fmt: skip
def test_the_cpu_agrees_with_the_reference(name, rows, columns, step, batch, dtype, seed):
    """Scales (and offsets, of half the range) are rounded once more than in the reference."""
    shape = (rows, columns * step)
    packed, x = pack(name, shape, seed), random((batch, shape[1]), seed, dtype)
    bias = random(shape[:1], seed, dtype)
    w, exact = dequantized(packed).double(), reference(x.double(), packed, bias.double())
    step_size = w.abs().amax(-1) if FORMATS[name].element.bits == 4 else 0
    size = x.double().abs() @ (w.abs() + torch.as_tensor(step_size).reshape(-1, 1)).T
    error = (packed_linear(x, packed, bias).double() - exact).abs()
    slack = 1 if dtype != torch.float32 else 16
    assert (error <= slack * torch.finfo(dtype).eps * (size + bias.double().abs())).all()


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "kernel"),
    [
        ("int8-channel", (5, 64), torch.bfloat16, "torch-int8"),
        ("int8-channel", (5, 41), torch.bfloat16, "torch-int8"),
        ("int8-channel-bf16", (5, 64), torch.float16, None),
        ("int4-g32-asym", (32, 64), torch.float32, "torch-int4"),
        ("int4-g64", (23, 97), torch.float32, "torch-int4"),
        ("int4-g16", (32, 64), torch.float32, None),
        ("int8-channel", (5, 64), torch.float64, None),
    ],
)
def test_cpu_kernels_take_what_torch_computes_rightly(name, shape, dtype, kernel):
    found = kernel_for(name, shape, 3, dtype, CPU)
    assert (found and found.name) == kernel
    product = Product(FORMATS[name], shape, 3, dtype, CPU)
    assert kernel or all(k.refusal(product) for k in KERNELS["cpu"])


@pytest.mark.parametrize(("name", "codes"), [("int8-channel", 16 * 64), ("int4-g32", 8 * 64)])
def test_repacked_weights_are_counted_and_freed_with_theirs(name, codes):
    packed = pack(name, (16, 64))
    assert repacked_bytes(packed) == 0
    for _ in range(2):
        packed_linear(random((1, 64)), packed)
    alone = repacked_bytes(packed)
    packed_linear(random((1, 64), dtype=torch.float16), packed)
    assert codes < alone < repacked_bytes(packed) < 2 * codes
    from quantization.kernels import torch_cpu

    kept = len(torch_cpu._repacked)
    del packed
    gc.collect()
    assert len(torch_cpu._repacked) == kept - 1


def test_triton_kernels_compile_for_the_gpus_that_they_name(tmp_path):
    """Without a GPU; and a decoding thread loads each word of its codes once."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "80", "90"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
