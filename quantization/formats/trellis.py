"""Trellis-coded quantization (QTIP, arXiv 2406.11235): b bits a weight, chosen many weights at a time.

A weight's value depends on its own b bits and on those of the weights before it, L in all, so a
code has 2^L values to fit with and not 2^b. For weights that look Gaussian the squared error is 0.50 to
0.63 of that of the best scalar quantizer of as many bits, and no group needs a scale.

Rings of 64 weights run down a column, since feedback (GPTQ) goes from column to column: what is
rounded together shares no row. The 2^L values are the quantiles of a Gaussian, shuffled by two
multiplications, so no file holds them (QTIP computes its codes to the same end; these are others, and
the files of EXL3, a relative, are laid out otherwise).
"""

from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

from quantization.errors import QuantizationError
from quantization.formats.base import Grid, Packed, ScalarFormat
from quantization.formats.viterbi import nearest_ring, states
from quantization.packing import pack_bits, packed_bytes, unpack_bits
from quantization.statistics import NOTHING_KNOWN, SiteStatistics

STATE_BITS = 12  # L: 14 would cut the error by 4 % more, in four times the time
RING = 64  # weights; rings of 256 would cut it by 1 %

SPREADS = {2: 1.0, 3: 1.07, 4: 1.1, 5: 1.12, 6: 1.14}
"""Standard deviations of the values by b, of least squared error for a Gaussian of one."""

MULTIPLIERS = (597, 1537)
"""Odd. Of 316 pairs the one of least error at 3 and 4 bits: 4 and 7 % below a random order."""

CPU = torch.device("cpu")
PART = 2**22  # weights that are on their way at once


@cache
def values(bits: int, device: torch.device = CPU) -> Tensor:
    """What the 2^L states stand for, float32: Gaussian quantiles in a shuffled order."""
    count = 2**STATE_BITS
    with torch.inference_mode(mode=False):  # it is kept, whoever asks first
        places = torch.arange(count, device="cpu")
        for multiplier in MULTIPLIERS:
            places = (places * multiplier + 435) % count
            places ^= places >> STATE_BITS // 2
        spread = torch.special.ndtri((places.double() + 0.5) / count) * SPREADS[bits]
        return spread.float().to(device)


@dataclass(frozen=True)
class Trellis(ScalarFormat):
    """Rings down the columns, and a float16 scale a row. Meant to be rotated before."""

    bits: int

    family = "trellis"
    joint = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """`trellis3`."""
        return f"trellis{self.bits}"

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Rows have to divide into rings."""
        if len(shape) < 2 or shape[-2] % RING:
            return f"{shape[-2] if len(shape) > 1 else 1} rows don't divide into rings of {RING}"
        return None

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """A bit stream and a scale a row."""
        *leading, columns = shape
        return prod(leading) * (packed_bytes(columns, self.bits) + 2)

    def fit(self, weight: Tensor, statistics: SiteStatistics = NOTHING_KNOWN) -> Grid:
        """Scales `... x rows x 1`: root mean squares."""
        scales = weight.square().mean(-1, keepdim=True).sqrt().half()
        if not scales.isfinite().all():
            raise QuantizationError(
                f"weights reach {weight.abs().max().item():.3g}, and a row's root mean square is "
                "above the 65504 that a float16 scale holds; keep this layer in bf16"
            )
        return {"scales": scales}

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """Symbols (uint8): the nearest ring, where a row's errors count as its scale is large."""
        scales = grid["scales"].float()
        inverse = torch.where(scales > 0, 1 / scales.clamp(min=2.0**-24), 0.0)
        squares = _rings(scales.square())
        mean = squares.mean(-1, keepdim=True)
        each = torch.where(mean > 0, squares / mean.clamp(min=1e-30), 1.0)  # of a column's rings
        table = values(self.bits, weight.device)

        def encoded(part: Tensor) -> Tensor:
            weights = each.unflatten(0, (-1, 1, weight.shape[-2] // RING))
            weights = weights.expand(-1, part.shape[-1], -1, -1).reshape(-1, RING)
            return _columns(
                nearest_ring(_rings(part * inverse), weights, table, self.bits), part.shape
            )

        return torch.cat([encoded(part) for part in _parts(weight)], -1)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Follow the rings."""
        table, scales = values(self.bits, codes.device), grid["scales"].float()

        def decoded(part: Tensor) -> Tensor:
            reached = states(_rings(part), self.bits, STATE_BITS)
            found = table.index_select(0, reached.flatten()).view(reached.shape)
            return _columns(found, part.shape) * scales

        return torch.cat([decoded(part) for part in _parts(codes)], -1)

    def take(self, grid: Grid, columns: Tensor, width: int) -> Grid:
        """A row's scale serves all its columns."""
        return grid

    def pack(self, codes: Tensor, grid: Grid) -> Packed:
        """A bit stream a row, and the scales."""
        tensors = {"codes": pack_bits(codes, self.bits), "scales": grid["scales"]}
        return Packed(self.name, tuple(codes.shape), tensors)

    def unpack(self, packed: Packed) -> tuple[Tensor, Grid]:
        """Undo `pack`."""
        codes = unpack_bits(packed.tensors["codes"], self.bits, packed.shape[-1])
        return codes.to(torch.uint8), {"scales": packed.tensors["scales"]}


def _parts(matrices: Tensor) -> tuple[Tensor, ...]:
    """Some columns at a time: what is made of a weight on the way takes several times its memory."""
    return matrices.split(max(1, PART // prod(matrices.shape[:-1])), -1)


def _rings(values: Tensor) -> Tensor:
    """Matrices (... x rows x columns) as rings x 64."""
    return values.mT.reshape(-1, RING)


def _columns(rings: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_rings`."""
    return rings.view(*shape[:-2], shape[-1], shape[-2]).mT.contiguous()
