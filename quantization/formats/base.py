"""The contract of a format: exact bytes for a shape, and how values go in and come out.

A weight is `... x rows x columns`; quantization groups run along the columns (a linear layer's
inputs) and leading dimensions are independent rows, which is how packed experts are stored.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

from torch import Tensor

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

    A format is a stateless declaration; it may be shared between threads and pickled. Quantizers
    call `fit`, `encode` and `decode`; only what is written to a file calls `pack`.
    """

    name: str
    family: str

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why the format doesn't apply to `shape`, or None when it does."""
        return None

    @abstractmethod
    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of a packed tensor of `shape`, equal to `pack(...).nbytes`."""

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Effective bits: scales, zero points and padding included."""
        return 8 * self.nbytes(shape) / prod(shape)

    @abstractmethod
    def fit(self, weight: Tensor) -> Grid:
        """The round-to-nearest grid of `weight` (float32).

        Raises:
            QuantizationError: the format's scales can't represent the weight's range.
        """

    @abstractmethod
    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """Codes of the nearest representable values, same shape as `weight`."""

    @abstractmethod
    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """The float32 values that `codes` stand for."""

    @abstractmethod
    def pack(self, codes: Tensor, grid: Grid) -> Packed:
        """Codes and grid as the bytes that a file would hold."""

    @abstractmethod
    def unpack(self, packed: Packed) -> tuple[Tensor, Grid]:
        """Undo `pack` exactly."""
