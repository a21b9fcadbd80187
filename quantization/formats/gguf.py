"""llama.cpp's weight types, bit for bit: ggml itself, out of the xllamacpp wheel, does the rounding.

    gguf-q4_0 … gguf-q8_0, gguf-iq4_nl, gguf-mxfp4      blocks of 32 columns
    gguf-q2_K … gguf-q6_K, gguf-iq1_s … gguf-iq4_xs     super-blocks of 256
    gguf-tq1_0, gguf-tq2_0                              super-blocks of 256, ternary

A row that doesn't divide into super-blocks gets the type that llama-quantize would give it
(`GGUFFormat.stored_type`), and its bytes are what we count. A process that makes its first iq2 or
iq1 tensor searches the type's codebook before, which takes ggml 2 to 13 s.
"""

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from quantization.errors import QuantizationError
from quantization.formats.base import Format, Grid, Packed
from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic

LARGEST = 2.0**15  # beyond it some types' float16 scales overflow, and some of ggml's code aborts
STEP = 2**20  # weights that are on their way at once, a thread

Imatrix = Literal["ignored", "used", "required"]


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types.

    Args:
        number: its `ggml_type`.
        columns: weights a block.
        block_bytes: bytes a block.
        imatrix: what its quantizer makes of an importance matrix.
        fallback: the type of rows that its blocks don't divide, if llama-quantize knows one.
    """

    number: int
    columns: int
    block_bytes: int
    imatrix: Imatrix = "used"
    fallback: str | None = None

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of whole blocks."""
        return columns // self.columns * self.block_bytes


# Sizes and numbers from ggml.h; "required" from ggml_quantize_requires_imatrix; fallbacks from
# llama.cpp's tensor_type_fallback (src/llama-quant.cpp; q2_K and q3_K fell to iq4_nl in old ones).
TYPES = {
    "f16": BlockType(1, 1, 2, "ignored"),
    "bf16": BlockType(30, 1, 2, "ignored"),
    "q4_0": BlockType(2, 32, 18),
    "q4_1": BlockType(3, 32, 20),
    "q5_0": BlockType(6, 32, 22),
    "q5_1": BlockType(7, 32, 24),
    "q8_0": BlockType(8, 32, 34, "ignored"),
    "iq4_nl": BlockType(20, 32, 18),
    "mxfp4": BlockType(39, 32, 17, "ignored"),
    "q2_K": BlockType(10, 256, 84, fallback="q4_0"),
    "q3_K": BlockType(11, 256, 110, fallback="q4_0"),
    "q4_K": BlockType(12, 256, 144, fallback="q5_0"),
    "q5_K": BlockType(13, 256, 176, fallback="q5_1"),
    "q6_K": BlockType(14, 256, 210, fallback="q8_0"),
    "iq1_s": BlockType(19, 256, 50, "required", fallback="iq4_nl"),
    "iq1_m": BlockType(29, 256, 56, fallback="iq4_nl"),
    "iq2_xxs": BlockType(16, 256, 66, "required", fallback="iq4_nl"),
    "iq2_xs": BlockType(17, 256, 74, "required", fallback="iq4_nl"),
    "iq2_s": BlockType(22, 256, 82, fallback="iq4_nl"),
    "iq3_xxs": BlockType(18, 256, 98, fallback="iq4_nl"),
    "iq3_s": BlockType(21, 256, 110, fallback="iq4_nl"),
    "iq4_xs": BlockType(23, 256, 136, fallback="iq4_nl"),
    "tq1_0": BlockType(34, 256, 54, "ignored", fallback="q4_0"),
    "tq2_0": BlockType(35, 256, 66, "ignored", fallback="q4_0"),
}
PLAIN = ("f16", "bf16")  # no blocks: what isn't quantized, and
LAST_RESORT = "f16"  # of types that have a fallback whose blocks don't divide the row either


def gguf_formats() -> Iterator["GGUFFormat"]:
    """A format for every type that one can ask llama-quantize for."""
    return (GGUFFormat(type) for type in TYPES if type not in PLAIN)


@dataclass(frozen=True)
class GGUFFormat(Format):
    """Rows of ggml's blocks.

    Codes are the bytes of a file (uint8, `... x rows x row bytes`); the grid holds the number of
    columns, which tells the stored type.
    """

    type: str

    family = "gguf"

    @property
    def name(self) -> str:  # type: ignore[override]
        """`gguf-q4_K`."""
        return f"gguf-{self.type}"

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        """The inputs' second moment, whose diagonal is llama.cpp's importance matrix."""
        return (
            frozenset() if TYPES[self.type].imatrix == "ignored" else frozenset({"second-moment"})
        )

    def stored_type(self, shape: tuple[int, ...]) -> str:
        """The type that a tensor of `shape` really gets: a key of `TYPES`, ggml's name for it."""
        kind, columns = TYPES[self.type], shape[-1]
        if columns % kind.columns == 0:
            return self.type
        if kind.fallback and columns % TYPES[kind.fallback].columns == 0:
            return kind.fallback
        return LAST_RESORT

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why not, or None: types of 32 columns fall back to nothing in llama.cpp."""
        kind = TYPES[self.type]
        if shape[-1] % kind.columns and not kind.fallback:
            return f"{shape[-1]} columns don't divide into {self.type}'s blocks of {kind.columns}"
        return None

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Whole blocks of the stored type, no padding."""
        return prod(shape[:-1]) * TYPES[self.stored_type(shape)].row_bytes(shape[-1])

    def nearest(
        self, weight: Tensor, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> tuple[Tensor, Grid]:
        """What llama-quantize writes for `weight` (`... x rows x columns`).

        Raises:
            QuantizationError: no xllamacpp, no importance where ggml requires one or one that
                doesn't fit, or weights beyond `LARGEST`.
        """
        *leading, rows, columns = weight.shape
        type = self.stored_type(weight.shape)
        codes = torch.empty(*leading, rows, TYPES[type].row_bytes(columns), dtype=torch.uint8)
        source, target = weight.reshape(-1, rows, columns), codes.view(-1, rows, codes.shape[-1])
        imatrix = _imatrix(type, weight.shape, statistics.importance)
        quantize = partial(ggml().ggml_quantize_chunk, TYPES[type].number)

        def encode(matrix: int, part: slice) -> None:
            block = source[matrix, part].to("cpu", torch.float32).contiguous()
            if not (largest := torch.linalg.vector_norm(block, torch.inf)) <= LARGEST:
                raise QuantizationError(
                    f"the largest weight, {largest:.3g}, is beyond the {LARGEST:.0f} that "
                    f"{self.name} holds; keep this layer in bf16"
                )
            known = None if imatrix is None else imatrix[matrix].data_ptr()
            into = target[matrix, part].data_ptr()
            quantize(block.data_ptr(), into, 0, len(block), columns, known)

        _each_part(source.shape, encode)
        return codes, {"columns": torch.tensor(columns)}

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """The float32 values as ggml reads them.

        Raises:
            QuantizationError: no xllamacpp.
        """
        columns = int(grid["columns"])
        type = self.stored_type((columns,))
        values = torch.empty(*codes.shape[:-1], columns)
        target = values.view(1, -1, columns)
        source = codes.cpu().contiguous().view(-1, codes.shape[-1])
        dequantize = _dequantizer(type)

        def read(matrix: int, part: slice) -> None:
            block = target[matrix, part]
            dequantize(source[part].data_ptr(), block.data_ptr(), block.numel())

        _each_part(target.shape, read)
        return values.to(codes.device)

    def pack(self, codes: Tensor, grid: Grid) -> Packed:
        """The codes are the bytes."""
        shape = (*codes.shape[:-1], int(grid["columns"]))
        return Packed(self.name, shape, {"blocks": codes.contiguous()})

    def unpack(self, packed: Packed) -> tuple[Tensor, Grid]:
        """The bytes are the codes."""
        return packed.tensors["blocks"], {"columns": torch.tensor(packed.shape[-1])}


def _imatrix(type: str, shape: tuple[int, ...], importance: Tensor | None) -> Tensor | None:
    """The importance that ggml gets, `matrices x columns`, or None for none.

    Raises:
        QuantizationError: it is required and missing, of another shape, negative or not finite.
    """
    *leading, _, columns = shape
    kind = TYPES[type]
    if kind.imatrix == "ignored" or (importance is None and kind.imatrix == "used"):
        return None
    if importance is None:
        raise QuantizationError(
            f"llama.cpp makes {type} from an importance matrix only, and there is none here; "
            "use a job that calibrates or imports one, or another format for this layer"
        )
    if importance.shape not in ((columns,), (*leading, columns)):
        raise QuantizationError(
            f"the importance matrix is {tuple(importance.shape)} where the weight is {tuple(shape)}"
        )
    if not (importance.isfinite() & (importance >= 0)).all():
        raise QuantizationError("the importance matrix holds negative or non-finite values")
    each = importance.to("cpu", torch.float32).expand(*leading, columns).reshape(-1, columns)
    # an expert that no token reached: ones, as in llama-quantize
    return torch.where(each.sum(-1, keepdim=True) > 0, each, 1.0).contiguous()


def _each_part(shape: tuple[int, ...], work: Callable[[int, slice], None]) -> None:
    """Call `work` for blocks of rows of `matrices x rows x columns`, as wide as torch computes.

    ggml works without Python's lock and rows are independent, so threads don't change a bit; and
    parts keep temporaries small, where big ones would tear the heap.
    """
    matrices, rows, columns = shape
    step = max(1, STEP // columns)
    parts = [(m, slice(r, r + step)) for m in range(matrices) for r in range(0, rows, step)]
    with ThreadPoolExecutor(min(torch.get_num_threads(), max(1, len(parts)))) as threads:
        for _ in threads.map(lambda part: work(*part), parts):  # the first error ends it
            pass


@cache
def ggml() -> ctypes.CDLL:
    """The shared library with ggml in it, loaded without its Python module.

    Raises:
        QuantizationError: it isn't installed, or doesn't show what we call.
    """
    spec = find_spec("xllamacpp")
    places = (spec and spec.submodule_search_locations) or ()
    files = [Path(place, f"xllamacpp{end}") for place in places for end in EXTENSION_SUFFIXES]
    try:
        library = ctypes.CDLL(str(next(file for file in files if file.exists())))
        quantize = library.ggml_quantize_chunk
    except (StopIteration, OSError, AttributeError) as error:
        raise QuantizationError(
            "gguf formats need llama.cpp's library; pip install 'bitfront[llama]'"
        ) from error
    # type, float32 source, destination, first element, rows, columns, imatrix; bytes written
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    quantize.restype = ctypes.c_size_t
    return library


def _dequantizer(type: str) -> Callable[[int, int, int], None]:
    """The reader of a type: source, float32 destination, number of values."""
    name = "ggml_fp16_to_fp32_row" if type == LAST_RESORT else f"dequantize_row_{type}"
    function = ggml()[name]  # a new object each time: its types are set below
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    return function
