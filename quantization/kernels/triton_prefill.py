"""Many activations times a packed weight: tiles dequantized in registers, for tensor cores.

A program holds rows x batch of the transposed result: the weight is the left operand, which tensor
cores take from registers, and the batch, which may be short, the narrow side. A tile's values are
those of the reference bit for bit (float32, cast to the activations' dtype); only the order of the
float32 sum differs. Where the result has too few tiles for the GPU, programs share the columns and
their float32 parts are added up afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantization.kernels.recipe import Operands, Recipe
from quantization.kernels.triton_dequantize import (
    level,
    load_codes,
    load_places,
    load_scales,
    load_words,
    load_zeros,
)
from quantization.kernels.triton_split import add_parts, parts_for


def _configs() -> list[triton.Config]:
    """Tiles to choose from; one where the interpreter stands in for a GPU."""
    if triton.knobs.runtime.interpret:
        return [triton.Config({"TILE_ROWS": 32, "TILE_COLUMNS": 64})]
    return [
        triton.Config({"TILE_ROWS": rows, "TILE_COLUMNS": columns}, num_warps=warps, num_stages=3)
        for rows, columns, warps in (
            (32, 128, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8),
        )
    ]  # fmt: skip


@triton.jit
def weight_tile(
    codes, scales, matrix_scale, indices, table, row, first, rows, columns, row_bytes, groups,
    ELEMENT: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, EXPONENT: tl.constexpr,
    SCALE: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, ZEROS: tl.constexpr,
    ALIGNED: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Float32 values of rows `row` and TILE_COLUMNS columns from `first` on."""
    stream = (codes + row * row_bytes)[:, None]
    in_rows = (row < rows)[:, None]
    if 32 % BITS == 0:  # every word is loaded once, then spread over its codes
        WORDS: tl.constexpr = TILE_COLUMNS * BITS // 32
        index = first * BITS // 32 + tl.arange(0, WORDS)[None, :]
        word = load_words(stream, row_bytes, index, in_rows, ALIGNED)
        shift = (tl.arange(0, 32 // BITS) * BITS).to(tl.uint32)
        code = (word[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    else:
        column = first + tl.arange(0, TILE_COLUMNS)[None, :]
        code = load_codes(stream, row_bytes, column, in_rows & (column < columns), BITS)
    SPAN: tl.constexpr = GROUP if GROUP > 0 and GROUP < TILE_COLUMNS else TILE_COLUMNS
    GROUPS: tl.constexpr = TILE_COLUMNS // SPAN
    code = tl.reshape(code, (TILE_ROWS, GROUPS, SPAN))
    if GROUP > 0:
        group = first // GROUP + tl.arange(0, GROUPS)[None, :]
    else:
        group = tl.zeros((1, GROUPS), tl.int32)
    valid = in_rows & (group < groups)
    row = row[:, None]
    place = load_places(indices, row, group, groups, valid, ELEMENT, BITS)
    value = level(
        code, place[:, :, None], table, in_rows[:, :, None],
        ELEMENT, BITS, EXPONENT, MANTISSA, ZEROS,
    )  # fmt: skip
    if ZEROS != "none":
        value = value - load_zeros(indices, row, group, groups, valid, BITS, ZEROS)[:, :, None]
    if SCALE != "none":
        scale = load_scales(scales, matrix_scale, row, group, groups, valid, SCALE, HEIGHT)
        value = value * scale[:, :, None]
    return tl.reshape(value, (TILE_ROWS, TILE_COLUMNS))


@triton.autotune(
    _configs(),
    key=["rows", "columns", "TILE_BATCH", "ELEMENT", "BITS", "SCALE", "GROUP", "ZEROS"],
)
@triton.jit
def prefill(
    x, codes, scales, matrix_scale, indices, table, bias, out,
    batch, rows, columns, row_bytes, groups, steps,
    ELEMENT: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, EXPONENT: tl.constexpr,
    SCALE: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, ZEROS: tl.constexpr,
    ALIGNED: tl.constexpr, BIASED: tl.constexpr, WIDE: tl.constexpr, TILE_BATCH: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of rows x batch over the columns of one part; `steps` columns to a part.

    WIDE: multiply in float32 what has been rounded; Triton's interpreter has no bfloat16 product.
    """
    # neighbours share a tile of the weight
    sample = tl.program_id(0) * TILE_BATCH + tl.arange(0, TILE_BATCH)
    row = (tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
    part = tl.program_id(2)
    in_batch = sample < batch
    total = tl.zeros((TILE_ROWS, TILE_BATCH), tl.float32)
    for first in range(part * steps, min(columns, (part + 1) * steps), TILE_COLUMNS):
        weight = weight_tile(
            codes, scales, matrix_scale, indices, table, row, first, rows, columns, row_bytes,
            groups, ELEMENT, BITS, MANTISSA, EXPONENT, SCALE, GROUP, HEIGHT, ZEROS, ALIGNED,
            TILE_ROWS, TILE_COLUMNS,
        )  # fmt: skip
        column = first + tl.arange(0, TILE_COLUMNS)
        places = x + sample.to(tl.int64)[None, :] * columns + column[:, None]
        inputs = tl.load(places, mask=(column < columns)[:, None] & in_batch[None, :], other=0.0)
        weight = weight.to(inputs.dtype)
        if WIDE:
            weight, inputs = weight.to(tl.float32), inputs.to(tl.float32)
        total = tl.dot(weight, inputs, total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    places = out + (part.to(tl.int64) * batch + sample)[None, :] * rows + row[:, None]
    valid = (row < rows)[:, None] & in_batch[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=valid)


def launch(
    x: Tensor, given: Operands, recipe: Recipe, bias: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """`x` (batch x columns) times the transposed weight, plus `bias`: batch x rows."""
    batch, (rows, columns) = len(x), shape
    tile = min(128, max(16, triton.next_power_of_2(batch)))
    # a part is whole groups and whole tiles of every configuration
    tiles = triton.cdiv(batch, tile) * triton.cdiv(rows, 64)
    parts, steps = parts_for(tiles, columns, 128, x.device)
    out = x.new_empty(parts, batch, rows, dtype=x.dtype if parts == 1 else torch.float32)
    row_bytes = given.codes.shape[-1]

    def grid(constants: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(batch, tile), triton.cdiv(rows, constants["TILE_ROWS"]), parts

    prefill[grid](
        x.contiguous(), *given[:-1], x if bias is None else bias, out,
        batch, rows, columns, row_bytes, given.groups, steps,
        **recipe.constants(),
        enable_fp_fusion=True,  # the default of releases before 3.10
        ALIGNED=row_bytes % 4 == 0 and given.codes.data_ptr() % 4 == 0,
        BIASED=bias is not None and parts == 1,
        WIDE=triton.knobs.runtime.interpret,
        TILE_BATCH=tile,
    )  # fmt: skip
    return add_parts(out, bias, x.dtype)
