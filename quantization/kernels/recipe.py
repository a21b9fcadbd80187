"""Recipes: a format as the compile-time constants and the operands of a kernel.

Kernels read a weight `level[code] x scale`, where codes are a little-endian bit stream a row
(`quantization/packing.py`). What a code means (`element`), how a scale is stored (`scale`) and how
many columns and rows share one are constants, so that each format gets code of its own.
"""

from dataclasses import asdict, dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from quantization.formats import Format, Grid
from quantization.formats.dialect import DIALECTS, DialectFP4
from quantization.formats.elements import FixedPoint, Lookup, MiniFloat, SignedInteger
from quantization.formats.row_tables import RowTables
from quantization.formats.scaled import Scaled
from quantization.formats.scales import PowerOfTwo, Rounded, ScaleType, TensorScaled


@dataclass(frozen=True)
class Recipe:
    """Compile-time constants of a format, named as the Triton kernels name them in capitals.

    Attributes:
        element: `integer` (offset binary), `fixed` (OCP MX INT8), `float`, `table` (one for all),
            `row_table` (one a row) or `dialect` (one of sixteen a group).
        bits: width of a code.
        mantissa: mantissa bits of a `float`.
        exponent: exponent bits of a `float`.
        scale: `none`, `plain` (a floating-point number), `power` (E8M0), `fp8` (E4M3 under one
            float32 a matrix) or `dialect` (five exponent bits).
        group: columns that share a scale; 0 for all.
        height: rows that share a scale; 0 for all.
        zeros: a group's zero point: `none`, a code of `bits` bits (`code`) or a float16 (`real`).
    """

    element: str
    bits: int
    mantissa: int = 0
    exponent: int = 0
    scale: str = "none"
    group: int = 0
    height: int = 1
    zeros: str = "none"

    def constants(self) -> dict[str, object]:
        """Keyword arguments of a Triton kernel."""
        return {name.upper(): value for name, value in asdict(self).items()}


class Operands(NamedTuple):
    """A packed matrix as kernels take it; what a format lacks is any tensor, and isn't read.

    Attributes:
        codes: uint8, rows x bytes.
        scales: row blocks x column blocks, or exponents as bit streams (`dialect`).
        matrix_scale: one float32 (`fp8`).
        indices: zero points or dialects, one a group, as bit streams or float16.
        table: float levels.
        groups: column blocks.
    """

    codes: Tensor
    scales: Tensor
    matrix_scale: Tensor
    indices: Tensor
    table: Tensor
    groups: int


@cache
def recipe(format: Format) -> Recipe | None:
    """The format's recipe; None where kernels have none (trits, second-level scales, sparse)."""
    if isinstance(format, RowTables):
        return Recipe("row_table", format.bits)
    if isinstance(format, DialectFP4):
        return Recipe("dialect", 4, scale="dialect", group=format.block)
    if not isinstance(format, Scaled):
        return None
    scale = _scale(format.scale)
    element = format.element
    group, height = format.columns or 0, format.rows or 0
    if scale is None or group & (group - 1) or 0 < group < 16:
        return None
    if isinstance(element, SignedInteger):
        zeros = ("real" if format.real_zeros else "code") if format.asymmetric else "none"
        return Recipe("integer", element.bits, 0, 0, scale, group, height, zeros)
    if isinstance(element, FixedPoint):
        return Recipe("fixed", element.bits, 0, 0, scale, group, height)
    if isinstance(element, MiniFloat):
        m, e = element.mantissa_bits, element.exponent_bits
        return Recipe("float", element.bits, m, e, scale, group, height)
    if isinstance(element, Lookup):
        return Recipe("table", element.bits, 0, 0, scale, group, height)
    return None


def operands(format: Format, tensors: Grid, columns: int) -> Operands:
    """A packed matrix's tensors (none of them copied) in a kernel's order."""
    codes = tensors["codes"]
    if isinstance(format, RowTables):
        return Operands(codes, codes, codes, codes, tensors["tables"], 1)
    if isinstance(format, DialectFP4):
        table = _dialects(codes.device)
        blocks = columns // format.block
        return Operands(codes, tensors["exponents"], codes, tensors["dialects"], table, blocks)
    assert isinstance(format, Scaled)
    scales = tensors["scales"]
    if scales.dtype == torch.float8_e4m3fn:
        scales = scales.view(torch.uint8)  # no kernel needs native 8-bit floats
    table = _levels(format, codes.device) if isinstance(format.element, Lookup) else codes
    groups = -(-columns // format.columns) if format.columns else 1
    matrix_scale = tensors.get("tensor_scale", codes)
    return Operands(codes, scales, matrix_scale, tensors.get("zeros", codes), table, groups)


def _scale(scale: ScaleType) -> str | None:
    if isinstance(scale, Rounded):
        return "plain"
    if isinstance(scale, PowerOfTwo):
        return "power"
    return "fp8" if isinstance(scale, TensorScaled) else None


@cache
def _levels(format: Scaled, device: torch.device) -> Tensor:
    return format.element.levels.to(device)


@cache
def _dialects(device: torch.device) -> Tensor:
    return DIALECTS.to(device).contiguous()
