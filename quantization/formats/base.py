"""The contract of a format: exact bytes for a shape, and how values go in and come out.

A weight is `... x rows x columns`; quantization groups run along the columns (a linear layer's
inputs) and leading dimensions are independent rows, which is how packed experts are stored.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import Tensor

from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic

Grid = dict[str, Tensor]
"""What a format needs beside the codes to decode them: scales, zero points (by name)."""


@dataclass(frozen=True)
class Packed:
    """A tensor as it would lie in a file: the format's name, the shape and the byte tensors."""

    format: str
    shape: tuple[int, ...]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, metadata and padding included."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Format(ABC):
    """How numbers are stored.

    A format is a stateless declaration; it may be shared between threads and pickled.

    Attributes:
        needs: the statistics that its values are chosen with; without them it still works, but
            no better than the weights alone allow.
    """

    name: str
    family: str
    needs: frozenset[Statistic] = frozenset()

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why the format doesn't apply to `shape`, or None when it does."""
        return None

    @abstractmethod
    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of a packed tensor of `shape`, equal to `pack(...).nbytes`."""

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Effective bits: scales, zero points, indices and padding included."""
        return 8 * self.nbytes(shape) / prod(shape)

    @abstractmethod
    def nearest(
        self, weight: Tensor, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> tuple[Tensor, Grid]:
        """Codes and grid of `weight` (float32), each value rounded by itself.

        Raises:
            QuantizationError: the format can't represent the weight's range.
        """

    @abstractmethod
    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """The float32 values that `codes` stand for."""

    @abstractmethod
    def pack(self, codes: Tensor, grid: Grid) -> Packed:
        """Codes and grid as the bytes that a file would hold."""

    @abstractmethod
    def unpack(self, packed: Packed) -> tuple[Tensor, Grid]:
        """Undo `pack` exactly."""


class ScalarFormat(Format):
    """A format whose values are rounded one by one on a grid that is fitted first.

    All that moves values between their neighbours (GPTQ, AutoRound) or searches for a better
    grid works on any of these.

    Attributes:
        batched: whether `take` works on a stack of matrices at once.
        rowwise: whether no rows share anything, so that `on_diagonal` works and a grid's tensors have
            their rows last but one.
        joint: whether a column's values are rounded together, which takes too long to do twice.
    """

    batched = True
    rowwise = False
    joint = False

    @abstractmethod
    def fit(self, weight: Tensor, statistics: SiteStatistics = NOTHING_KNOWN) -> Grid:
        """The round-to-nearest grid of `weight` (float32)."""

    def fit_parts(self, weight: Tensor, statistics: SiteStatistics, fit: "Fit") -> Grid:
        """The grid with `fit` instead of `fit` of each format that this one is made of."""
        return self.fit(weight, statistics)

    @abstractmethod
    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """Codes of the nearest representable values, same shape as `weight`."""

    @abstractmethod
    def take(self, grid: Grid, columns: Tensor, width: int) -> Grid:
        """The grid of the columns with these indices alone, to encode and decode just those.

        `width` is how many columns the given grid is for; it may itself have been taken.
        """

    def on_diagonal(self, taken: Grid, offset: int, rows: slice) -> Grid:
        """The grid of the values on a diagonal of taken columns, as that of one column.

        Args:
            taken: `... x rows x columns` of it.
            offset: the column of row 0's value, as `torch.diagonal` has it.
            rows: those that have a value there.
        """
        return {name: t.diagonal(offset, -2, -1)[..., None] for name, t in taken.items()}

    def nearest(
        self, weight: Tensor, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> tuple[Tensor, Grid]:
        """`fit`, then `encode`."""
        grid = self.fit(weight, statistics)
        return self.encode(weight, grid), grid


Fit = Callable[[Tensor, ScalarFormat, SiteStatistics], Grid]
"""Fits a format's grid to a weight."""
