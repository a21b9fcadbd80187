"""The contract of a kernel: which products it computes from packed bytes, and how."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from quantization.formats import Format, Packed


class Product(NamedTuple):
    """What decides whether a kernel applies: `batch` rows of activations times one packed matrix.

    Attributes:
        shape: rows x columns of the weight (outputs x inputs).
        dtype: of the activations and of the result.
        device: where activations and weight lie.
    """

    format: Format
    shape: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    device: torch.device


class Kernel(ABC):
    """Multiplies activations by a packed weight without writing the dequantized matrix to memory.

    Stateless; it may be shared between threads.

    Attributes:
        devices: what it runs on, as `bitfront formats` prints it: `cuda sm80+`.
    """

    name: str
    devices: str

    @abstractmethod
    def supports(self, format: Format) -> bool:
        """Whether some products of this format are computed here; needs no device."""

    @abstractmethod
    def refusal(self, product: Product) -> str | None:
        """Why this product is left to the reference, or None when `run` computes it."""

    @abstractmethod
    def run(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """`x` (batch x columns) times the transposed weight, plus `bias` (rows): batch x rows.

        Only products without `refusal` may be asked for.
        """
