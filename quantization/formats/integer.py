"""Uniform integers with a float16 scale a group, symmetric or with an integer zero point.

Definitions as in the survey (arXiv 2510.16805, section 2):

    symmetric   S = max|x| / (2^(b-1) - 1)           q = clamp(round(x / S), -2^(b-1), 2^(b-1) - 1)
    asymmetric  S = (max - min) / (2^b - 1)          q = clamp(round(x / S) + Z, 0, 2^b - 1)
                Z = round(-min / S), b bits          x^ = S (q - Z)

where an asymmetric range always contains zero. A group that doesn't divide the columns leaves a
shorter last group with a scale of its own; no code is spent on padding. Effective bits of whole
groups: b + 16 / G symmetric, b + (16 + b) / G asymmetric.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from quantization.errors import QuantizationError
from quantization.formats.base import Format, Grid, Packed
from quantization.packing import pack_bits, packed_bytes, unpack_bits

SMALLEST_SCALE = 2.0**-24  # float16's smallest subnormal: a zero scale would make 0 / 0
LARGEST_SCALE = 65504.0


@dataclass(frozen=True)
class Integer(Format):
    """Integers of `bits` bits.

    Args:
        bits: width of a code, 2 to 8.
        group: columns that share a scale; None for one scale a row ("per channel").
        asymmetric: whether each group has an integer zero point of `bits` bits.
    """

    bits: int
    group: int | None
    asymmetric: bool = False

    family = "integer"

    @property
    def name(self) -> str:  # type: ignore[override]  # derived, so that it can't disagree
        """For example `int4-g64`, `int8-channel`, `int3-g32-asym`."""
        group = "channel" if self.group is None else f"g{self.group}"
        return f"int{self.bits}-{group}{'-asym' if self.asymmetric else ''}"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Codes and zero points as bit streams padded to a byte a row, two bytes a scale."""
        *leading, columns = shape
        groups = self._groups(columns)
        zeros = packed_bytes(groups, self.bits) if self.asymmetric else 0
        return prod(leading) * (packed_bytes(columns, self.bits) + 2 * groups + zeros)

    def fit(self, weight: Tensor) -> Grid:
        """Scales (and zero points) from each group's extremes, `... x rows x groups`."""
        grouped = self._grouped(weight)
        if self.asymmetric:
            low = grouped.amin(-1).clamp(max=0)
            scales = _storable((grouped.amax(-1).clamp(min=0) - low) / (2**self.bits - 1))
            zeros = (-low / scales.float()).round().clamp(0, 2**self.bits - 1)
            return {"scales": scales, "zeros": zeros.to(torch.int16)}
        return {"scales": _storable(grouped.abs().amax(-1) / (2 ** (self.bits - 1) - 1))}

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """Nearest codes as int16: 0 … 2^b - 1 asymmetric, -2^(b-1) … 2^(b-1) - 1 symmetric."""
        columns = weight.shape[-1]
        codes = (self._grouped(weight) / grid["scales"].float().unsqueeze(-1)).round_()
        if self.asymmetric:
            codes = codes.add_(grid["zeros"].unsqueeze(-1)).clamp_(0, 2**self.bits - 1)
        else:
            codes = codes.clamp_(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        return codes.flatten(-2)[..., :columns].to(torch.int16)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """S (q - Z) in float32."""
        columns = codes.shape[-1]
        values = self._grouped(codes.to(torch.float32))
        if self.asymmetric:
            values = values - grid["zeros"].unsqueeze(-1)
        values = values * grid["scales"].float().unsqueeze(-1)
        return values.flatten(-2)[..., :columns]

    def pack(self, codes: Tensor, grid: Grid) -> Packed:
        """Bit streams of codes (symmetric ones offset by 2^(b-1)) and zero points, fp16 scales."""
        offset = 0 if self.asymmetric else 2 ** (self.bits - 1)
        tensors = {"codes": pack_bits(codes + offset, self.bits), "scales": grid["scales"]}
        if self.asymmetric:
            tensors["zeros"] = pack_bits(grid["zeros"], self.bits)
        return Packed(self.name, tuple(codes.shape), tensors)

    def unpack(self, packed: Packed) -> tuple[Tensor, Grid]:
        """Undo `pack`."""
        columns = packed.shape[-1]
        offset = 0 if self.asymmetric else 2 ** (self.bits - 1)
        codes = unpack_bits(packed.tensors["codes"], self.bits, columns) - offset
        grid: Grid = {"scales": packed.tensors["scales"]}
        if self.asymmetric:
            grid["zeros"] = unpack_bits(packed.tensors["zeros"], self.bits, self._groups(columns))
        return codes, grid

    def _groups(self, columns: int) -> int:
        return 1 if self.group is None else -(-columns // self.group)

    def _grouped(self, weight: Tensor) -> Tensor:
        """`... x groups x group size`; zeros that pad the last group never widen its range."""
        columns = weight.shape[-1]
        size = columns if self.group is None else self.group
        if columns % size:
            weight = torch.nn.functional.pad(weight, (0, -columns % size))
        return weight.unflatten(-1, (-1, size))


def _storable(scales: Tensor) -> Tensor:
    """The scales as float16, never zero; raises if one overflows."""
    largest = scales.max().item() if scales.numel() else 0.0
    if largest > LARGEST_SCALE:
        raise QuantizationError(
            f"a group needs the scale {largest:.3g}, above float16's largest {LARGEST_SCALE:g}; "
            "keep this layer in bf16"
        )
    return scales.clamp(min=SMALLEST_SCALE).to(torch.float16)
