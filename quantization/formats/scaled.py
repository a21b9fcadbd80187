"""Scaled formats: elements that share a scale over a block, which covers most of the field.

    x^ = S (level[code] - Z)        S = reach / largest, as its scale type stores it

    integers    int4-g64, int8-channel, int3-g32-asym     float16 scales (others by suffix)
    floats      fp8-e4m3, fp8-e4m3-channel, fp8-e4m3-b128, fp4-e2m1-g32
    MX, NVFP4   blocks of 32 with E8M0 scales; of 16 with E4M3 scales and one float32 a tensor
    nf4-g64     a table; ternary-g64: five codes a byte

Definitions of integers as in the survey (arXiv 2510.16805, section 2): a symmetric S is
max|x| / (2^(b-1) - 1); an asymmetric one (max - min) / (2^b - 1) with the b-bit integer zero point
Z = round(-min / S), over a range that always contains zero. Effective bits of whole groups:
b + 16 / G symmetric, b + (16 + b) / G asymmetric.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from quantization.formats.base import Grid, Packed, ScalarFormat
from quantization.formats.elements import UNIT, Element
from quantization.formats.scales import ScaleType
from quantization.packing import pack_bits, packed_bytes, unpack_bits
from quantization.statistics import NOTHING_KNOWN, SiteStatistics

WHOLE = None
"""As a block's extent: all rows, or all columns."""


@dataclass(frozen=True)
class Scaled(ScalarFormat):
    """A declaration of element, scale type and block.

    Args:
        columns: columns that share a scale; `WHOLE` for all of them.
        rows: rows that share a scale: 1, a tile's height or `WHOLE`.
        asymmetric: whether each group has a zero point Z, an integer as wide as the element; codes
            are then read as 0 … 2^b - 1.
        real_zeros: whether Z is a float16 instead, as HQQ and its kernels have it.
        ragged: whether a last, shorter block is allowed.
    """

    name: str
    family: str
    element: Element
    scale: ScaleType
    columns: int | None
    rows: int | None = 1
    asymmetric: bool = False
    real_zeros: bool = False
    ragged: bool = True

    @property
    def rowwise(self) -> bool:  # type: ignore[override]
        """See `ScalarFormat`."""
        return self.rows == 1

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why not, or None."""
        if not self.ragged and self.columns and shape[-1] % self.columns:
            return f"{shape[-1]} columns don't divide into blocks of {self.columns}"
        return None

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Codes and zero points as bit streams padded to a byte a row, and the scales."""
        *leading, rows, columns = (1, *shape) if len(shape) == 1 else shape
        scales = self._scales_shape((*leading, rows, columns))
        zeros = packed_bytes(scales[-1], self.element.bits) if self.asymmetric else 0
        zeros = 2 * scales[-1] if self.real_zeros else zeros
        row = self.element.packed_bytes(columns)
        return prod(leading) * (rows * row + scales[-2] * zeros) + self.scale.nbytes(scales)

    def fit(
        self,
        weight: Tensor,
        statistics: SiteStatistics = NOTHING_KNOWN,
        shrink: Tensor | float = 1.0,
    ) -> Grid:
        """Scales (and zero points) from what `shrink` leaves of each block's reach.

        A clipping search varies `shrink`, of the shape of the scales or one number for all.
        """
        blocks = self._blocks(weight)
        if not self.asymmetric:
            counts = self.block_sums(torch.ones(weight.shape[-2:], device=weight.device))
            return self.scale.store(self.element.reach(blocks, counts) * shrink, self.element)
        low = blocks.amin(-1).clamp(max=0) * shrink
        high = blocks.amax(-1).clamp(min=0) * shrink
        grid = self.scale.store((high - low) / (2**self.element.bits - 1), UNIT)
        return self.with_zeros(grid, -low / self.scale.load(grid))

    def with_zeros(self, grid: Grid, zeros: Tensor) -> Grid:
        """The grid with other zero points, rounded to what is stored of them."""
        zeros = zeros.clamp(0, 2**self.element.bits - 1)
        return {**grid, "zeros": zeros.half() if self.real_zeros else zeros.round().to(torch.int16)}

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """Nearest bit patterns (int16), same shape as `weight`."""
        grouped, scales, zeros = self._aligned(weight, grid)
        x = grouped / scales
        if zeros is None:
            codes = self.element.encode(x)
        else:
            codes = x.add_(zeros).round_().clamp_(0, 2**self.element.bits - 1).to(torch.int16)
        return codes.flatten(-2)[..., : weight.shape[-1]]

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """S (level - Z) in float32."""
        grouped, scales, zeros = self._aligned(codes, grid)
        values = self.element.decode(grouped) if zeros is None else grouped.float() - zeros
        return values.mul_(scales).flatten(-2)[..., : codes.shape[-1]]

    def neighbours(self, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """The representable values just below and just above each weight, equal at the ends."""
        grouped, scales, zeros = self._aligned(weight, grid)
        zeros = torch.zeros(()) if zeros is None else zeros.float()
        if self.asymmetric:
            levels = torch.arange(2.0**self.element.bits, device=weight.device)
        else:
            levels = self.element.levels.to(weight.device)
            levels = levels[levels.isfinite()].sort().values.unique_consecutive()
        above = torch.searchsorted(levels, (grouped / scales + zeros).contiguous())
        last = len(levels) - 1
        ends = ((above - 1).clamp(0, last), above.clamp(0, last))
        values = [(levels[end] - zeros) * scales for end in ends]
        low, high = (v.flatten(-2)[..., : weight.shape[-1]] for v in values)
        return low, high

    def take(self, grid: Grid, columns: Tensor, width: int) -> Grid:
        """See `ScalarFormat.take`: scales of single columns, as float32."""
        if "column_scales" in grid:
            return {name: tensor.index_select(-1, columns) for name, tensor in grid.items()}
        blocks = columns // (self.columns or width)
        taken = {"column_scales": self.scale.load(grid).index_select(-1, blocks)}
        if self.asymmetric:
            taken["zeros"] = grid["zeros"].index_select(-1, blocks)
        return taken

    def pack(self, codes: Tensor, grid: Grid) -> Packed:
        """Bit streams of codes and zero points; scales as they are stored."""
        tensors = {"codes": self.element.pack(codes), **self.scale.pack(grid)}
        if self.asymmetric:
            zeros = grid["zeros"]
            tensors["zeros"] = zeros if self.real_zeros else pack_bits(zeros, self.element.bits)
        return Packed(self.name, tuple(codes.shape), tensors)

    def unpack(self, packed: Packed) -> tuple[Tensor, Grid]:
        """Undo `pack`."""
        codes = self.element.unpack(packed.tensors["codes"], packed.shape[-1])
        shape = self._scales_shape(packed.shape)
        grid = self.scale.unpack(packed.tensors, shape)
        if self.asymmetric:
            zeros = packed.tensors["zeros"]
            grid["zeros"] = (
                zeros if self.real_zeros else unpack_bits(zeros, self.element.bits, shape[-1])
            )
        return codes, grid

    def block_sums(self, values: Tensor) -> Tensor:
        """Sums of `... x rows x columns` over each scale's block, of the shape of the scales."""
        return self._blocks(values).sum(-1)

    def spread(self, blocks: Tensor, weight: Tensor) -> Tensor:
        """One number a block, repeated for each of its weights."""
        rows, columns = weight.shape[-2:]
        wide = _stretched(blocks, rows, self.rows or rows)
        return wide.repeat_interleave(self.columns or columns, -1)[..., :columns]

    def _scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        *leading, rows, columns = shape
        return *leading, _count(rows, self.rows), _count(columns, self.columns)

    def _blocks(self, weight: Tensor) -> Tensor:
        """`... x row blocks x column blocks x block size`; padding never widens a range."""
        height, width = self.rows or weight.shape[-2], self.columns or weight.shape[-1]
        blocks = _padded(weight, -1, width).unflatten(-1, (-1, width))
        if height == 1:
            return blocks
        blocks = _padded(blocks, -3, height).unflatten(-3, (-1, height))
        return blocks.movedim(-3, -2).flatten(-2)

    def _aligned(self, matrix: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
        """The matrix in column blocks, with scales and zero points that broadcast over them."""
        if "column_scales" in grid:
            scales, width = grid["column_scales"], 1
        else:
            scales, width = self.scale.load(grid), self.columns or matrix.shape[-1]
        zeros = grid.get("zeros")
        rows = matrix.shape[-2]
        scales = _stretched(scales, rows, self.rows)
        zeros = None if zeros is None else _stretched(zeros, rows, self.rows)
        grouped = _padded(matrix, -1, width).unflatten(-1, (-1, width))
        return grouped, scales[..., None], None if zeros is None else zeros[..., None]


def _count(extent: int, block: int | None) -> int:
    return 1 if block is None else -(-extent // block)


def _padded(tensor: Tensor, dim: int, multiple: int) -> Tensor:
    """Zeros after the end of a dimension (counted from behind) up to a multiple."""
    missing = -tensor.shape[dim] % multiple
    if not missing:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0) * (-dim - 1) + (0, missing))


def _stretched(scales: Tensor, rows: int, block: int | None) -> Tensor:
    """Scales of row blocks, repeated for each row (or left to broadcast)."""
    if block is None or block == 1:
        return scales
    return scales.repeat_interleave(block, dim=-2)[..., :rows, :]
