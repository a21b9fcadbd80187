"""One to four activations times a packed weight: as fast as its bytes come from memory.

Too few activations for tensor cores: every code is one multiplication a row of activations. Codes
are read as 32-bit words, each once, in chunks: the least number of words that hold whole codes (one
for 2, 4 and 8 bits; three for 3 and 6, five for 5, seven for 7). Lanes take neighbouring chunks, so that words
are coalesced, and every thread keeps several rows, so that activations are shared and many loads
are under way. Scales are applied to sums over their group.

An integer isn't shifted down: what its bits mean in place, 2^s x code, comes from one logical
operation and one subtraction (the mantissa bits of 2^23), and the activations are divided by 2^s,
which is exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantization.kernels.recipe import Operands, Recipe
from quantization.kernels.triton_dequantize import (
    level,
    load_places,
    load_scales,
    load_words,
    load_zeros,
)
from quantization.kernels.triton_split import add_parts, parts_for


def _configs() -> list[triton.Config]:
    """Tiles to choose from; one where the interpreter stands in for a GPU."""
    if triton.knobs.runtime.interpret:
        return [triton.Config({"TILE_ROWS": 8, "TILE_CHUNKS": 8})]
    return [
        triton.Config({"TILE_ROWS": rows, "TILE_CHUNKS": chunks}, num_warps=warps)
        for rows, chunks, warps in (
            (8, 32, 1), (16, 32, 1), (8, 64, 2), (16, 64, 2), (8, 128, 4), (16, 128, 4),
        )
    ]  # fmt: skip


@triton.jit
def value_in(
    word, before, place, table, valid, START: tl.constexpr,
    ELEMENT: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, EXPONENT: tl.constexpr,
    ZEROS: tl.constexpr,
):  # fmt: skip
    """The value of the code at bit START of `word`, or that begins -START bits before its end.

    An integer within the word comes times 2^(START % 16), exactly.
    """
    if ELEMENT == "integer" and START >= 0:
        SHIFT: tl.constexpr = START % 16
        OFFSET: tl.constexpr = 1 << (BITS - 1) if ZEROS == "none" else 0
        if START >= 16:
            word = word >> 16
        masked = (word & (((1 << BITS) - 1) << SHIFT)) | 0x4B000000
        value = masked.to(tl.float32, bitcast=True) - (8388608.0 + (OFFSET << SHIFT))
    else:
        if START >= 0:
            code = word >> START
        else:
            code = (before >> (32 + START)) | (word << -START)
        code = code & ((1 << BITS) - 1)
        value = level(code, place, table, valid, ELEMENT, BITS, EXPONENT, MANTISSA, ZEROS)
    return value


@triton.autotune(
    _configs(),
    key=["rows", "columns", "TILE_BATCH", "ELEMENT", "BITS", "SCALE", "GROUP", "ZEROS"],
)
@triton.jit(do_not_specialize=["row_bytes"])
def decode(
    x, codes, scales, matrix_scale, indices, table, bias, out,
    batch, rows, columns, row_bytes, groups, steps,
    ELEMENT: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, EXPONENT: tl.constexpr,
    SCALE: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, ZEROS: tl.constexpr,
    ALIGNED: tl.constexpr, BIASED: tl.constexpr, TILE_BATCH: tl.constexpr,
    WORDS: tl.constexpr, CODES: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_CHUNKS: tl.constexpr,
):  # fmt: skip
    """TILE_ROWS rows over the columns of one part; `steps` columns to a part."""
    SPAN: tl.constexpr = GROUP if GROUP > 0 and GROUP < CODES else CODES
    sample = tl.arange(0, TILE_BATCH)
    row = (tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)[:, None]
    part = tl.program_id(1)
    in_rows = row < rows
    stream = codes + row * row_bytes
    total = tl.zeros((TILE_BATCH, TILE_ROWS, TILE_CHUNKS), tl.float32)
    sums = tl.zeros_like(total)
    inputs = tl.zeros((TILE_BATCH, TILE_CHUNKS), tl.float32)
    last = min(columns, (part + 1) * steps)
    for first in range(part * steps, last, TILE_CHUNKS * CODES):
        chunk = first // CODES + tl.arange(0, TILE_CHUNKS)[None, :]
        before = tl.zeros((TILE_ROWS, TILE_CHUNKS), tl.uint32)
        in_part = chunk * CODES < last
        for k in tl.static_range(WORDS):
            word = load_words(stream, row_bytes, chunk * WORDS + k, in_rows & in_part, ALIGNED)
            for i in tl.static_range(CODES):
                if (i * BITS + BITS - 1) // 32 == k:
                    column = chunk * CODES + i
                    valid = (sample < batch)[:, None] & (column < last)
                    given = tl.load(x + sample[:, None] * columns + column, mask=valid, other=0.0)
                    given = given.to(tl.float32)
                    group = column // GROUP if GROUP > 0 else column * 0
                    in_groups = in_rows & (group < groups)
                    if i % SPAN == 0:
                        place = load_places(indices, row, group, groups, in_groups, ELEMENT, BITS)
                    if ZEROS != "none":
                        inputs += given
                    value = value_in(
                        word, before, place, table, in_rows, i * BITS - 32 * k,
                        ELEMENT, BITS, MANTISSA, EXPONENT, ZEROS,
                    )  # fmt: skip
                    if ELEMENT == "integer" and i * BITS >= 32 * k:
                        given = given * (0.5 ** (i * BITS % 16))
                    sums += value[None, :, :] * given[:, None, :]
                    if GROUP > 0 and (i + 1) % SPAN == 0:
                        if ZEROS != "none":
                            zero = load_zeros(indices, row, group, groups, in_groups, BITS, ZEROS)
                            sums -= zero[None, :, :] * inputs[:, None, :]
                            inputs = tl.zeros_like(inputs)
                        scale = load_scales(
                            scales, matrix_scale, row, group, groups, in_groups, SCALE, HEIGHT
                        )
                        total += sums * scale[None, :, :]
                        sums = tl.zeros_like(sums)
            before = word
    result = tl.sum(total if GROUP > 0 else sums, 2)
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS).to(tl.int64)
    if GROUP == 0 and SCALE != "none":
        if ZEROS != "none":
            zero = load_zeros(indices, row, row * 0, groups, row < rows, BITS, ZEROS)
            result -= zero[None, :] * tl.sum(inputs, 1)[:, None]
        scale = load_scales(scales, matrix_scale, row, row * 0, groups, row < rows, SCALE, HEIGHT)
        result *= scale[None, :]
    if BIASED:
        result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    places = out + (part * batch + sample)[:, None] * rows + row[None, :]
    valid = (sample < batch)[:, None] & (row < rows)[None, :]
    tl.store(places, result.to(out.dtype.element_ty), mask=valid)


def launch(
    x: Tensor, given: Operands, recipe: Recipe, bias: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """`x` (batch x columns) times the transposed weight, plus `bias`: batch x rows."""
    batch, (rows, columns) = len(x), shape
    words, codes = chunk(recipe.bits)
    # a part is whole groups, and enough columns to keep a program busy
    parts, steps = parts_for(triton.cdiv(rows, 16), columns, 32 * max(codes, 4), x.device)
    out = x.new_empty(parts, batch, rows, dtype=x.dtype if parts == 1 else torch.float32)
    row_bytes = given.codes.shape[-1]

    def grid(constants: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(rows, constants["TILE_ROWS"]), parts

    decode[grid](
        x.contiguous(), *given[:-1], x if bias is None else bias, out,
        batch, rows, columns, row_bytes, given.groups, steps,
        **recipe.constants(),
        enable_fp_fusion=True,  # the default of releases before 3.10
        ALIGNED=row_bytes % 4 == 0 and given.codes.data_ptr() % 4 == 0,
        BIASED=bias is not None and parts == 1,
        TILE_BATCH=triton.next_power_of_2(batch),
        WORDS=words,
        CODES=codes,
    )  # fmt: skip
    return add_parts(out, bias, x.dtype)


def chunk(bits: int) -> tuple[int, int]:
    """The fewest 32-bit words that hold whole codes, and how many codes they hold."""
    words = {3: 3, 5: 5, 6: 3, 7: 7}.get(bits, 1)
    return words, 32 * words // bits
