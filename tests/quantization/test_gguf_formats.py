"""llama.cpp's types: ggml's own bytes, read back alike by ggml and gguf-py, for any shape."""

import ctypes
import pickle

import gguf
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quantization.errors import QuantizationError
from quantization.formats import FORMATS
from quantization.formats import gguf as formats
from quantization.formats.gguf import LARGEST, PLAIN, STEP, TYPES, GGUFFormat
from quantization.quantizers import QUANTIZERS
from quantization.statistics import SiteStatistics

RTN = QUANTIZERS["rtn"]
SLOW = ("iq1_s", "iq1_m", "iq2_xs", "iq2_s")  # ggml searches their codebooks for up to 13 s
ALL = [type for type in TYPES if type not in PLAIN]
QUICK = [type for type in ALL if type not in SLOW]
USING = [type for type in QUICK if TYPES[type].imatrix != "ignored"]
COLUMNS = 512


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def known(*shape, seed=1):
    """Importance as layers have it: a few inputs matter much more than the rest."""
    return SiteStatistics(importance=random(*shape, seed=seed) ** 6 + 1e-3)


def quantize(type, weight, statistics):
    return RTN.quantize(weight, FORMATS[f"gguf-{type}"], statistics)


def by_ggml(type, weight, importance):
    """What ggml_quantize_chunk writes, called here without any of the format's code."""
    library = formats.ggml()
    weight = np.ascontiguousarray(weight.numpy(), np.float32)
    number = gguf.GGMLQuantizationType[type.upper()]
    block, size = gguf.GGML_QUANT_SIZES[number]
    out = np.zeros((len(weight), weight.shape[1] // block * size), np.uint8)
    matrix = None if importance is None else importance.numpy().ctypes.data
    written = library.ggml_quantize_chunk(
        number, weight.ctypes.data, out.ctypes.data, 0, *weight.shape, matrix
    )
    assert written == out.nbytes
    return out


@pytest.mark.parametrize("type", TYPES)
def test_the_table_is_ggmls(type):
    number = gguf.GGMLQuantizationType[type.upper()]
    kind = TYPES[type]
    assert (kind.columns, kind.block_bytes) == gguf.GGML_QUANT_SIZES[number]
    assert kind.number == number
    library = formats.ggml()
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    assert library.ggml_type_name(kind.number).decode() == type
    assert library.ggml_quantize_requires_imatrix(kind.number) == (kind.imatrix == "required")


@pytest.mark.parametrize(
    ("type", "importance"),
    [
        (type, importance)
        for type in QUICK
        for importance in (None, known(COLUMNS).importance)
        if TYPES[type].imatrix != "required" or importance is not None
    ],
)
def test_the_bytes_are_ggmls(type, importance):
    weight, statistics = random(5, COLUMNS), SiteStatistics(importance=importance)
    packed = quantize(type, weight, statistics).pack()
    expected = by_ggml(type, weight, importance)
    assert np.array_equal(packed.tensors["blocks"].numpy(), expected)
    assert packed.nbytes == FORMATS[f"gguf-{type}"].nbytes(weight.shape) == expected.nbytes


@pytest.mark.parametrize("type", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0"])
def test_the_bytes_are_those_of_the_reference_in_python(type):
    weight = random(5, COLUMNS)
    expected = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[type.upper()])
    assert np.array_equal(quantize(type, weight, SiteStatistics()).codes.numpy(), expected)


@pytest.mark.parametrize("type", QUICK)
def test_ggml_and_gguf_py_read_the_same_values(type):
    quantized = quantize(type, random(5, COLUMNS), known(COLUMNS))
    number = gguf.GGMLQuantizationType[type.upper()]
    expected = gguf.dequantize(quantized.codes.numpy(), number)
    assert np.array_equal(quantized.dequantize().numpy(), expected)


@pytest.mark.parametrize("type", ALL)
def test_ggml_and_gguf_py_read_any_bytes_alike(type):
    """All codebook entries of all types, those that take long to write included."""
    row = TYPES[type].row_bytes(COLUMNS)
    codes = torch.randint(0, 256, (64, row), generator=torch.Generator().manual_seed(2))
    codes = codes.to(torch.uint8)
    values = FORMATS[f"gguf-{type}"].decode(codes, {"columns": torch.tensor(COLUMNS)})
    with np.errstate(all="ignore"):  # some of these scales are infinite or no numbers
        expected = gguf.dequantize(codes.numpy(), gguf.GGMLQuantizationType[type.upper()])
    assert np.array_equal(values.numpy(), expected, equal_nan=True)


FALLBACKS = {
    **dict.fromkeys(["q2_K", "q3_K", "tq1_0", "tq2_0"], "q4_0"),
    "q4_K": "q5_0",
    "q5_K": "q5_1",
    "q6_K": "q8_0",
    **dict.fromkeys([type for type in ALL if type.startswith("iq") and type != "iq4_nl"], "iq4_nl"),
}


@pytest.mark.parametrize("type", FALLBACKS)
def test_rows_that_blocks_do_not_divide_get_llama_quantizes_fallback(type):
    """The table of tensor_type_fallback; 576 columns are SmolLM2's, 100 nobody's."""
    format = GGUFFormat(type)
    assert format.stored_type((3, 768)) == type
    assert format.stored_type((3, 576)) == FALLBACKS[type]
    assert format.stored_type((3, 100)) == "f16"
    for columns in (576, 100):
        weight, statistics = random(3, columns), known(columns)
        quantized = quantize(type, weight, statistics)
        other = format.stored_type(weight.shape)
        expected = by_ggml(other, weight, statistics.importance)
        assert np.array_equal(quantized.codes.numpy(), expected)
        assert quantized.pack().nbytes == format.nbytes(weight.shape) == expected.nbytes
        assert ((quantized.dequantize() - weight).norm() / weight.norm()) < 0.12


@pytest.mark.parametrize("type", [type for type in ALL if type not in FALLBACKS])
def test_types_that_llama_quantize_would_stop_at_are_refused(type):
    assert "blocks of 32" in FORMATS[f"gguf-{type}"].refusal((3, 100))
    assert FORMATS[f"gguf-{type}"].refusal((3, 96)) is None


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["q4_0", "q8_0", "q4_K", "q6_K", "iq4_xs", "iq2_xxs", "mxfp4"]),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 31, 32, 96, 256, 512])),
    st.integers(0, 2**31),
)
def test_experts_are_quantized_each_with_its_own_importance(type, shape, seed):
    format = FORMATS[f"gguf-{type}"]
    assume(format.refusal(shape) is None)
    weight, statistics = random(*shape, seed=seed), known(shape[0], shape[2], seed=seed + 1)
    together = quantize(type, weight, statistics)
    apart = [
        quantize(type, expert, SiteStatistics(importance=row)).dequantize()
        for expert, row in zip(weight, statistics.importance, strict=True)
    ]
    assert torch.equal(together.dequantize(), torch.stack(apart))
    codes, grid = format.unpack(together.pack())
    assert torch.equal(format.decode(codes, grid), together.dequantize())


@pytest.mark.parametrize("type", USING)
def test_importance_lowers_the_error_that_it_weighs(type):
    weight, statistics = random(16, COLUMNS), known(COLUMNS)
    flat = SiteStatistics(importance=torch.ones(COLUMNS))

    def loss(given):
        values = quantize(type, weight, given).dequantize()
        return ((values - weight) ** 2 * statistics.importance).sum()

    assert loss(statistics) < 0.95 * loss(flat)
    assert FORMATS[f"gguf-{type}"].needs == {"second-moment"}


@pytest.mark.parametrize("type", ["q8_0", "mxfp4", "tq1_0", "tq2_0"])
def test_types_whose_quantizer_ignores_importance_ask_for_none(type):
    weight = random(4, COLUMNS)
    with_it = by_ggml(type, weight, known(COLUMNS).importance)
    assert np.array_equal(with_it, by_ggml(type, weight, None))
    assert FORMATS[f"gguf-{type}"].needs == frozenset()


def test_an_expert_that_no_token_reached_is_quantized_as_without_importance():
    weight, importance = random(2, 4, 256), known(2, 256).importance
    importance[1] = 0
    codes = quantize("iq2_xxs", weight, SiteStatistics(importance=importance)).codes
    expected = by_ggml("iq2_xxs", weight[1], torch.ones(256))
    assert np.array_equal(codes[1].numpy(), expected)


@pytest.mark.parametrize("type", ["iq2_xxs", "iq2_xs", "iq1_s"])
def test_types_that_require_importance_say_so_unless_they_fall_back(type):
    with pytest.raises(QuantizationError, match=f"{type} from an importance matrix"):
        quantize(type, random(2, 256), SiteStatistics())
    quantize(type, random(2, 96), SiteStatistics())


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.ones(255), r"is \(255,\) where the weight is \(2, 256\)"),
        (torch.full((256,), -1.0), "negative or non-finite"),
        (torch.full((256,), torch.nan), "negative or non-finite"),
    ],
)
def test_importance_that_does_not_fit_is_refused(importance, message):
    with pytest.raises(QuantizationError, match=message):
        quantize("q4_K", random(2, 256), SiteStatistics(importance=importance))


@pytest.mark.parametrize("type", QUICK)
def test_no_weight_within_the_limit_overflows_or_ends_the_process(type):
    """Some of ggml's quantizers abort on what they can't handle, so the limit must be safe."""
    edge = random(4, COLUMNS).sign() * LARGEST
    zeros, mixed = torch.zeros(1, COLUMNS), random(1, COLUMNS) * LARGEST / 8
    weight = torch.cat([edge, zeros, mixed.clamp(-LARGEST, LARGEST), edge[:1] * 1e-40])
    importance = torch.ones(COLUMNS)
    importance[:256] = 0
    for known in (importance, torch.full((COLUMNS,), 1e-30)):
        assert (
            quantize(type, weight, SiteStatistics(importance=known)).dequantize().isfinite().all()
        )
    with pytest.raises(QuantizationError, match="keep this layer in bf16"):
        quantize(type, edge * 2, SiteStatistics(importance=importance))


@pytest.mark.parametrize("type", ["q4_K", "q8_0"])
def test_neither_blocks_of_rows_nor_the_layout_in_memory_change_a_bit(type):
    columns = 1024
    weight = random(columns, STEP // columns + 3).mT  # more than a step, and not contiguous
    quantized = quantize(type, weight, SiteStatistics())
    assert np.array_equal(quantized.codes.numpy(), by_ggml(type, weight.contiguous(), None))
    number = gguf.GGMLQuantizationType[type.upper()]
    expected = gguf.dequantize(quantized.codes.numpy(), number)
    assert np.array_equal(quantized.dequantize().numpy(), expected)


@pytest.mark.parametrize(("type", "columns"), [("q4_0", 96), ("q4_K", 512), ("q6_K", 96)])
def test_packed_bytes_are_what_a_gguf_file_holds(type, columns, tmp_path):
    quantized = quantize(type, random(3, 4, columns), SiteStatistics())
    stored = GGUFFormat(type).stored_type((3, 4, columns))
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    blocks = quantized.pack().tensors["blocks"].numpy()
    writer.add_tensor("x", blocks, raw_dtype=gguf.GGMLQuantizationType[stored.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    assert tensor.tensor_type.name.lower() == stored.lower()
    assert tensor.n_bytes == FORMATS[f"gguf-{type}"].nbytes((3, 4, columns))
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(values, quantized.dequantize().numpy())


def test_bytes_are_counted_and_formats_sent_without_the_library(monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    formats.ggml.cache_clear()
    format = pickle.loads(pickle.dumps(FORMATS["gguf-q4_K"]))
    assert format.bits_per_weight((8, 512)) == 4.5
    assert format.bits_per_weight((8, 576)) == 5.5
    with pytest.raises(QuantizationError, match=r"pip install 'bitfront\[llama\]'"):
        quantize("q4_K", random(2, 256), SiteStatistics())
    monkeypatch.undo()
    formats.ggml.cache_clear()
    quantize("q4_K", random(2, 256), SiteStatistics())
