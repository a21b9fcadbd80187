"""bfloat16: the full precision that everything else is compared with. Template for a format."""

from math import prod

import torch
from torch import Tensor

from quantization.formats.base import Grid, Packed, ScalarFormat
from quantization.statistics import NOTHING_KNOWN, SiteStatistics


class BFloat16(ScalarFormat):
    """16-bit brain floating point: a float32 with its lower mantissa half rounded away."""

    name = "bf16"
    family = "float"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Two bytes a value, no metadata."""
        return 2 * prod(shape)

    def fit(self, weight: Tensor, statistics: SiteStatistics = NOTHING_KNOWN) -> Grid:
        """Nothing to fit: the format has no scales."""
        return {}

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """Round to nearest even."""
        return weight.to(torch.bfloat16)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Widen to float32, exactly."""
        return codes.to(torch.float32)

    def take(self, grid: Grid, columns: Tensor, width: int) -> Grid:
        """Nothing to take from."""
        return {}

    def pack(self, codes: Tensor, grid: Grid) -> Packed:
        """The codes are the bytes."""
        return Packed(self.name, tuple(codes.shape), {"values": codes.contiguous()})

    def unpack(self, packed: Packed) -> tuple[Tensor, Grid]:
        """The bytes are the codes."""
        return packed.tensors["values"], {}
