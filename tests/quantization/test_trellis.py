"""Trellis-coded formats and their rotation."""

from itertools import product

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from quantization.adapter import describe
from quantization.bank import Bank
from quantization.checkpoints import resolve
from quantization.errors import QuantizationError
from quantization.formats import FORMATS, viterbi, viterbi_cpu
from quantization.formats.rotated import turn, turn_back
from quantization.formats.trellis import RING, values
from quantization.formats.viterbi import _ring, nearest_ring, states
from quantization.quantizers import QUANTIZERS
from quantization.schemes import Scheme
from quantization.statistics import SiteStatistics
from tests.conftest import choices_of

# Max (1960), table I: least squared error of a scalar quantizer of 2^b levels for a Gaussian of one
LLOYD_MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.0006442}


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cost(wanted, weights, table, bits, symbols):
    state_bits = (len(table) - 1).bit_length()
    found = table[states(symbols, bits, state_bits)]
    return (weights * (wanted - found).square()).sum(-1)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 6), st.integers(1, 20), st.integers(2, 9), st.integers(0, 2**31))
def test_the_compiled_search_is_as_near_as_the_reference(bits, sequences, steps, seed):
    wanted = gaussian(sequences, 8 * steps, seed=seed)
    weights = gaussian(sequences, 8 * steps, seed=seed + 1).square() + 0.1
    table = values(bits)
    compiled = viterbi_cpu.nearest_ring(wanted, weights, table, bits)
    reference = _ring(wanted.T, weights.T, table, bits)
    near, far = (cost(wanted, weights, table, bits, s) for s in (compiled, reference))
    # sums of float32 may tip the balance between the seams of two rings, seldom
    assert torch.isclose(near, far, rtol=1e-4).float().mean() >= 1 - 1 / sequences
    assert near.sum() <= 1.1 * far.sum()


@pytest.mark.parametrize("search", ["compiled", "reference"])
def test_rings_are_as_near_as_the_nearest_of_all(search, monkeypatch):
    """Against every ring of 6 steps over 16 states: never nearer, and on the whole as near."""
    table, wanted, weights = gaussian(16, seed=1), gaussian(64, 6), gaussian(64, 6).exp()
    every = torch.tensor(list(product(range(4), repeat=6)), dtype=torch.uint8)
    best = torch.stack([
        cost(x.expand(len(every), -1), w, table, 2, every).min()
        for x, w in zip(wanted, weights, strict=True)
    ])  # fmt: skip
    if search == "reference":
        monkeypatch.setattr(viterbi, "_compiled", lambda: None)
        monkeypatch.setattr(viterbi, "STEP", 6 * 4 * 10)  # ten rings at a time
    found = nearest_ring(wanted, weights, table, 2)
    got = cost(wanted, weights, table, 2, found)
    assert (got >= best * (1 - 1e-5)).all()
    assert torch.isclose(got, best, rtol=1e-4).float().mean() > 0.7
    assert got.sum() < 1.2 * best.sum()


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_a_gaussian_loses_little_more_than_half_of_what_the_best_scalar_quantizer_loses(bits):
    """And no less than Shannon's bound, D = 2^-2R."""
    weight = gaussian(RING * 8, 64)
    format = FORMATS[f"trellis{bits}"]
    error = (QUANTIZERS["rtn"].quantize(weight, format).dequantize() - weight).square().mean()
    assert 2.0 ** (-2 * bits) < error < (0.64 if bits == 2 else 0.56) * LLOYD_MAX[bits]


def test_outliers_are_spread():
    """A channel of large weights takes the scale of all rows, unless it is turned into all columns."""
    weight = gaussian(256, 256)
    weight[:, 7] *= 30
    weight[11, 40] *= 100
    format = FORMATS["trellis3"]
    rotated = QUANTIZERS["rtn"].quantize(weight, format).dequantize()
    as_it_is = QUANTIZERS["rtn"].quantize(weight, format.inner).dequantize()
    errors = [(q - weight).square().sum() / weight.square().sum() for q in (rotated, as_it_is)]
    assert errors[0] < 1.35 * 0.0188  # of a Gaussian
    assert errors[0] < 0.2 * errors[1]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_turning_keeps_lengths_and_is_undone(blocks, seed):
    x = gaussian(3, 16 * blocks, seed=seed)
    turned = turn(x)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-4)
    assert torch.allclose(turn_back(turned), x, atol=1e-4)


def statistics(columns, seed=3):
    inputs = gaussian(2000, columns, seed=seed) @ gaussian(columns, columns, seed=seed + 1)
    moment = inputs.T @ inputs / len(inputs)
    return SiteStatistics(second_moment=moment, importance=moment.diagonal())


def test_an_error_costs_the_same_in_both_bases():
    format, known = FORMATS["trellis3"], statistics(64)
    error = gaussian(128, 64)
    turned, moment = format.turned(error), format.turned_statistics(known).second_moment
    assert ((turned @ moment) * turned).sum() == pytest.approx(
        float(((error @ known.second_moment) * error).sum()), rel=1e-4
    )


@pytest.mark.parametrize("quantizer", ["gptq", "yaqa"])
def test_feedback_between_columns_pays(quantizer):
    """Errors under the inputs' second moment, against rings that don't know of each other."""
    weight, format, known = gaussian(128, 128), FORMATS["trellis3"], statistics(128)

    def loss(quantizer):
        error = QUANTIZERS[quantizer].quantize(weight, format, known).dequantize() - weight
        return float(((error @ known.second_moment) * error).sum())

    assert loss(quantizer) < 0.5 * loss("rtn")


def test_alike_is_as_one_by_one():
    weights, known = [gaussian(64, 64, seed=s) for s in range(3)], [statistics(64)] * 3
    for name in ("gptq", "yaqa"):
        together = QUANTIZERS[name].quantize_alike(weights, FORMATS["trellis2"], known)
        for weight, own in zip(weights, together, strict=True):
            alone = QUANTIZERS[name].quantize(weight, FORMATS["trellis2"], known[0])
            assert torch.allclose(own.dequantize(), alone.dequantize(), atol=1e-5)


def test_stacked_experts_are_quantized_each():
    weight = gaussian(2, 64, 32)
    whole = QUANTIZERS["rtn"].quantize(weight, FORMATS["trellis4"])
    each = [QUANTIZERS["rtn"].quantize(w, FORMATS["trellis4"]).dequantize() for w in weight]
    assert torch.equal(whole.dequantize(), torch.stack(each))
    assert whole.pack().nbytes == FORMATS["trellis4"].nbytes((2, 64, 32)) == 2 * 64 * (16 + 2)


@pytest.mark.parametrize("bits", LLOYD_MAX)
@pytest.mark.parametrize("shape", [(192, 576), (2, 64, 48)])
def test_bytes_are_as_predicted_and_give_the_values_back(bits, shape):
    format = FORMATS[f"trellis{bits}"]
    quantized = QUANTIZERS["rtn"].quantize(gaussian(*shape) ** 3, format)
    packed = quantized.pack()
    assert packed.nbytes == format.nbytes(shape)
    assert torch.equal(format.decode(*format.unpack(packed)), quantized.dequantize())


def test_large_weights_are_taken_in_parts(monkeypatch):
    whole = FORMATS["trellis3"].nearest(gaussian(2, 64, 96))
    monkeypatch.setattr("quantization.formats.trellis.PART", 2 * 64 * 7)
    parts = FORMATS["trellis3"].nearest(gaussian(2, 64, 96))
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(FORMATS["trellis3"].decode(*whole), FORMATS["trellis3"].decode(*parts))


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_exact_values_find_their_codes_again(bits):
    """In float32; 16 bits can blur two states into one, and banks keep the codes beside such values."""
    format = FORMATS[f"trellis{bits}"]
    quantized = QUANTIZERS["rtn"].quantize(gaussian(128, 64), format)
    assert torch.equal(format.encode(quantized.dequantize(), quantized.grid), quantized.codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_banks_keep_the_codes_that_were_measured(tmp_path, dtype, monkeypatch):
    """Packed bytes of an export: no second rounding, which 16-bit values wouldn't survive."""
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, vocab_size=64,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    checkpoint = resolve(str(tmp_path / "model"))
    layout, scheme = describe(checkpoint), Scheme("trellis6")
    bank = Bank(checkpoint, layout, QUANTIZERS["gptq"], dtype, tmp_path / "bank")
    bank.build(choices_of(layout, [scheme]))
    monkeypatch.setattr("quantization.quantizers.gptq.GPTQ.quantize_alike", None)
    monkeypatch.setattr("quantization.quantizers.gptq.GPTQ.grid", None)
    for unit in (u for u in layout.units if u.layer is not None):
        for parameter, measured in bank.tensors(unit, scheme).items():
            packed = bank.packed_parameters(unit, scheme, parameter)
            values = FORMATS["trellis6"].decode(*FORMATS["trellis6"].unpack(packed))
            assert torch.equal(values.to(dtype), measured)


def test_threads_change_nothing():
    weight, before = gaussian(576, 576), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            codes, grid = FORMATS["trellis3"].nearest(weight)
            found.append((codes, grid["scales"], FORMATS["trellis3"].decode(codes, grid)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((100, 64), "100 rows don't divide into Hadamard blocks of 16"),
        ((64, 100), "100 columns don't divide into Hadamard blocks of 16"),
        ((96, 64), "96 rows don't divide into rings of 64"),
        ((64,), "1 rows don't divide"),
    ],
)
def test_shapes_that_dont_divide_are_refused(shape, reason):
    assert reason in FORMATS["trellis3"].refusal(shape)


def test_zeros_stay_zeros_and_what_is_no_number_is_refused():
    format = FORMATS["trellis3"]
    assert not QUANTIZERS["rtn"].quantize(torch.zeros(64, 64), format).dequantize().any()
    with pytest.raises(QuantizationError, match="keep this layer in bf16"):
        QUANTIZERS["rtn"].quantize(torch.full((64, 64), 1e6), format)
    weight = torch.ones(64, 64)
    weight[0, 0] = torch.nan
    for name in ("rtn", "gptq", "yaqa"):
        with pytest.raises(QuantizationError, match="1 of 4096 weights"):
            QUANTIZERS[name].quantize(weight, format, statistics(64))


def test_one_weight_off_a_row_of_zeros():
    """A row's scale rounds to zero in float16 where its weights are tiny: no NaN comes of it."""
    weight = torch.zeros(64, 64)
    weight[5, 5] = 1e-9
    assert QUANTIZERS["rtn"].quantize(weight, FORMATS["trellis2"]).dequantize().isfinite().all()
