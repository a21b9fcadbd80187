"""Rotated formats: a weight is turned to a basis where it looks Gaussian, and quantized there.

    W' = R_out^T W R_in        R = diag(signs) Hadamard, in blocks along the diagonal

A random Hadamard matrix spreads outliers over a block (QuIP#, arXiv 2402.04396, section 3; QTIP
and EXL3 do the same). Signs follow from the size alone, so nothing is stored; whoever multiplies
packed bytes turns the inputs by R_in and the outputs back by R_out^T.

A quantizer that knows how to move values does so in the turned basis, with turned statistics.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantization.formats.base import Format, Grid, Packed, ScalarFormat
from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic

LARGEST, SMALLEST = 128, 16  # of the blocks: powers of two; EXL3's are 128


@dataclass(frozen=True)
class Rotated(Format):
    """`inner` in the turned basis, under the same name."""

    inner: ScalarFormat

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the inner format."""
        return self.inner.name

    @property
    def family(self) -> str:  # type: ignore[override]
        """That of the inner format."""
        return self.inner.family

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        """That of the inner format."""
        return self.inner.needs

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Rows and columns have to divide into blocks."""
        if len(shape) > 1:
            for size, what in zip(shape[-2:], ("rows", "columns"), strict=True):
                if size % SMALLEST:
                    return f"{size} {what} don't divide into Hadamard blocks of {SMALLEST}"
        return self.inner.refusal(shape)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """That of the inner format: signs aren't stored."""
        return self.inner.nbytes(shape)

    def turned(self, weight: Tensor) -> Tensor:
        """R_out^T W R_in."""
        return turn(turn(weight.mT).mT)

    def turned_statistics(self, known: SiteStatistics) -> SiteStatistics:
        """The statistics of the turned weight; what is known of single weights alone is lost."""
        if "turned" not in known.remembered:
            moments = {
                name: None if moment is None else turn(turn(moment.float()).mT).mT
                for name, moment in (
                    ("second_moment", known.second_moment),
                    ("input_curvature", known.input_curvature),
                )
            }
            second = moments["second_moment"]
            diagonal = None if second is None else second.diagonal(dim1=-2, dim2=-1)
            known.remembered["turned"] = SiteStatistics(importance=diagonal, **moments)
        turned: SiteStatistics = known.remembered["turned"]
        return turned

    def nearest(
        self, weight: Tensor, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> tuple[Tensor, Grid]:
        """The inner format's, in the turned basis."""
        known = self.turned_statistics(statistics) if self.needs else NOTHING_KNOWN
        return self.inner.nearest(self.turned(weight), known)

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """Codes of a weight in its own basis, on a grid that was fitted before."""
        return self.inner.encode(self.turned(weight), grid)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """The inner format's values, turned back."""
        return turn_back(turn_back(self.inner.decode(codes, grid)).mT).mT.contiguous()

    def pack(self, codes: Tensor, grid: Grid) -> Packed:
        """As the inner format."""
        return self.inner.pack(codes, grid)

    def unpack(self, packed: Packed) -> tuple[Tensor, Grid]:
        """As the inner format."""
        return self.inner.unpack(packed)


def turn(x: Tensor) -> Tensor:
    """X R along the last dimension."""
    return _hadamard(x * _signs(x.shape[-1]).to(x))


def turn_back(x: Tensor) -> Tensor:
    """X R^T along the last dimension."""
    return _hadamard(x) * _signs(x.shape[-1]).to(x)


def _hadamard(x: Tensor) -> Tensor:
    """Each block of the last dimension by the Hadamard matrix, which is its own inverse.

    In butterflies, whose sums are the same on all machines; a library's product may order them otherwise.
    """
    size = x.shape[-1]
    block, span = min(LARGEST, size & -size), 1
    old, new = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    while span < block:
        (a, b), (left, right) = (
            t.unflatten(-1, (size // (2 * span), 2, span)).unbind(-2) for t in (old, new)
        )
        torch.add(a, b, out=left)
        torch.sub(a, b, out=right)
        old, new = new, torch.empty_like(new) if old is x else old
        span *= 2
    return old * block**-0.5


@cache
def _signs(size: int) -> Tensor:
    """Of each place, on the CPU."""
    digest = hashlib.shake_256(f"rotation of {size}".encode()).digest(-(-size // 8))
    with torch.inference_mode(mode=False):  # they are kept, whoever asks first
        octets = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        bits = (octets[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")).flatten()
        return 1.0 - 2.0 * (bits[:size] & 1).float()
