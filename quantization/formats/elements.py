"""Elements: what the bits of one code stand for, in units of its scale.

A code is the raw bit pattern, 0 … 2^bits - 1, exactly as it is packed, and `levels` is its whole
meaning: kernels need nothing else. Encoding rounds to nearest, ties to even where the format's
specification says so, and saturates.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantization.packing import pack_bits, pack_trits, packed_bytes, unpack_bits, unpack_trits


class Element(ABC):
    """One code's meaning.

    Attributes:
        name: as format names begin: `int4`, `fp8-e4m3`.
        bits: width of a code.
        largest: the magnitude that a group's reach is scaled to.
        emax: exponent of the largest power of two among the levels (OCP MX, section 5).
    """

    name: str
    bits: int
    largest: float
    emax: int

    @property
    @abstractmethod
    def levels(self) -> Tensor:
        """The float32 value of each bit pattern, 2^bits of them."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Bit patterns (int16) of the levels nearest to `x` (float32, in units of the scale)."""

    def decode(self, codes: Tensor) -> Tensor:
        """The levels of bit patterns."""
        table = self.levels.to(codes.device)
        return table.index_select(0, codes.flatten().int()).view(codes.shape)

    def reach(self, groups: Tensor, counts: Tensor) -> Tensor:
        """What of each group (... x size) maps to `largest`: its absolute maximum.

        `counts` says how many of a group's values are weights; zeros pad the others.
        """
        return groups.abs().amax(-1)

    def pack(self, codes: Tensor) -> Tensor:
        """Rows of codes as bytes."""
        return pack_bits(codes, self.bits)

    def unpack(self, stream: Tensor, columns: int) -> Tensor:
        """Undo `pack`."""
        return unpack_bits(stream, self.bits, columns)

    def packed_bytes(self, columns: int) -> int:
        """Bytes of a packed row."""
        return packed_bytes(columns, self.bits)


@dataclass(frozen=True)
class SignedInteger(Element):
    """-2^(b-1) … 2^(b-1) - 1, stored with an offset of 2^(b-1)."""

    bits: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """`int4`."""
        return f"int{self.bits}"

    @property
    def largest(self) -> float:  # type: ignore[override]
        """2^(b-1) - 1: the extra negative level isn't scaled to."""
        return 2.0 ** (self.bits - 1) - 1

    @property
    def emax(self) -> int:  # type: ignore[override]
        """Of 2^(b-2)."""
        return self.bits - 2

    @property
    def levels(self) -> Tensor:
        """See `Element.levels`."""
        return torch.arange(2.0**self.bits) - 2 ** (self.bits - 1)

    def encode(self, x: Tensor) -> Tensor:
        """See `Element.encode`."""
        half = 2 ** (self.bits - 1)
        return x.round().clamp_(-half, half - 1).add_(half).to(torch.int16)

    def decode(self, codes: Tensor) -> Tensor:
        """Arithmetic: faster than the table."""
        return codes.to(torch.float32) - 2 ** (self.bits - 1)


@dataclass(frozen=True)
class FixedPoint(Element):
    """OCP MX INT8: two's complement with an implied scale of 2^-6; -2 is left unused."""

    name: str = "int8"
    bits: int = 8
    largest: float = 127 / 64
    emax: int = 0

    @property
    def levels(self) -> Tensor:
        """See `Element.levels`."""
        return torch.arange(256).to(torch.uint8).view(torch.int8).float() / 64

    def encode(self, x: Tensor) -> Tensor:
        """See `Element.encode`."""
        return (x * 64).round().clamp_(-127, 127).to(torch.int16) & 0xFF


@dataclass(frozen=True)
class MiniFloat(Element):
    """Sign, exponent and mantissa bits with subnormals.

    Args:
        largest: the greatest finite value; larger ones saturate to it (OCP MX, section 5.3).
        reserved: what the patterns above it mean: nothing, NaN (E4M3) or infinity and NaN (E5M2).
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def name(self) -> str:  # type: ignore[override]
        """`fp8-e4m3`."""
        return f"fp{self.bits}-e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """2^(e-1) - 1."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def emax(self) -> int:  # type: ignore[override]
        """Of the largest value."""
        return math.frexp(self.largest)[1] - 1

    @cached_property
    def levels(self) -> Tensor:
        """See `Element.levels`; NaN where the pattern is reserved."""
        patterns = torch.arange(2 ** (self.bits - 1))
        exponent, mantissa = patterns >> self.mantissa_bits, patterns % 2**self.mantissa_bits
        normal = (1 + mantissa / 2**self.mantissa_bits) * 2.0 ** (exponent - self.bias)
        subnormal = mantissa / 2**self.mantissa_bits * 2.0 ** (1 - self.bias)
        magnitude = torch.where(exponent > 0, normal, subnormal).float()
        magnitude[magnitude > self.largest] = torch.nan
        return torch.cat([magnitude, -magnitude])

    def encode(self, x: Tensor) -> Tensor:
        """See `Element.encode`: ties to even, saturating."""
        bits, m = x.contiguous().view(torch.int32), self.mantissa_bits
        smallest = 1 - self.bias
        exponent = (((bits >> 23) & 0xFF) - 127).clamp_(smallest, self.emax)
        steps = torch.ldexp(x.abs().clamp_(max=self.largest), m - exponent).round_()
        # a subnormal's pattern is its count of steps; each binade adds 2^m; a carry lands right
        patterns = ((exponent - smallest) << m) + steps.int()
        return (patterns + (bits.lt(0).int() << (self.bits - 1))).to(torch.int16)


@dataclass(frozen=True)
class Lookup(Element):
    """Any sorted table of 2^bits values, the largest magnitude first or last."""

    name: str
    values: tuple[float, ...]

    emax = 0

    @property
    def bits(self) -> int:  # type: ignore[override]
        """log2 of the table's length."""
        return (len(self.values) - 1).bit_length()

    @property
    def largest(self) -> float:  # type: ignore[override]
        """The largest magnitude."""
        return max(map(abs, self.values))

    @cached_property
    def levels(self) -> Tensor:
        """See `Element.levels`."""
        return torch.tensor(self.values)

    def encode(self, x: Tensor) -> Tensor:
        """See `Element.encode`; ties go down."""
        levels = self.levels.to(x.device)
        return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2).to(torch.int16)


@dataclass(frozen=True)
class Ternary(Element):
    """-1, 0, 1 as codes 0, 1, 2; five of them share a byte (3^5 = 243).

    A group's reach is its mean magnitude (BitNet b1.58, arXiv 2402.17764, equation 3).
    """

    name: str = "ternary"
    bits: int = 2
    largest: float = 1.0
    emax: int = 0

    @property
    def levels(self) -> Tensor:
        """See `Element.levels`; the fourth pattern is never written."""
        return torch.tensor([-1.0, 0.0, 1.0, torch.nan])

    def encode(self, x: Tensor) -> Tensor:
        """See `Element.encode`."""
        return x.round().clamp_(-1, 1).add_(1).to(torch.int16)

    def decode(self, codes: Tensor) -> Tensor:
        """Arithmetic: faster than the table."""
        return codes.to(torch.float32) - 1

    def reach(self, groups: Tensor, counts: Tensor) -> Tensor:
        """The mean magnitude."""
        return groups.abs().sum(-1) / counts

    def pack(self, codes: Tensor) -> Tensor:
        """Five codes a byte."""
        return pack_trits(codes)

    def unpack(self, stream: Tensor, columns: int) -> Tensor:
        """Undo `pack`."""
        return unpack_trits(stream, columns)

    def packed_bytes(self, columns: int) -> int:
        """1.6 bits a code."""
        return (columns + 4) // 5


UNIT = Lookup("unit", (-1.0, 1.0))
"""Stands for an element where what is stored are the scales themselves."""
E4M3 = MiniFloat(4, 3, 448.0)
E5M2 = MiniFloat(5, 2, 57344.0)
E3M2 = MiniFloat(3, 2, 28.0)
E2M3 = MiniFloat(2, 3, 7.5)
E2M1 = MiniFloat(2, 1, 6.0)
NF4 = Lookup(
    "nf4",
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip
"""NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E)."""
