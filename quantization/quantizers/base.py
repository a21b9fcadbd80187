"""The contract of a quantizer: the algorithm that puts a tensor into a format."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quantization.errors import QuantizationError
from quantization.formats import Format, Grid, Packed
from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic

REVISION = 1
"""Raise it when a change of formats or quantizers changes what they give: banks and measurements
of before are then made anew instead of being taken for the same."""


@dataclass(frozen=True)
class Quantized:
    """A tensor in a format, not yet packed: codes (... x rows x columns) and their grid."""

    format: Format
    codes: Tensor
    grid: Grid

    def dequantize(self) -> Tensor:
        """The float32 values that the codes stand for."""
        return self.format.decode(self.codes, self.grid)

    def pack(self) -> Packed:
        """The bytes that a file would hold."""
        return self.format.pack(self.codes, self.grid)


class Quantizer(ABC):
    """Puts tensors into formats. Stateless; `identity` enters the key of every measurement.

    Attributes:
        needs: the statistics that it works with, beside those that a format needs.
    """

    name: str
    needs: frozenset[Statistic] = frozenset()

    @property
    def identity(self) -> str:
        """Name and every setting that changes the result."""
        return self.name

    @abstractmethod
    def quantize(
        self, weight: Tensor, format: Format, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> Quantized:
        """Quantize `weight` (float, ... x rows x columns); the argument isn't changed.

        Formats whose values can't be moved one by one are left to their own rounding.

        Raises:
            QuantizationError: NaN or infinity in the weight, or a range the format can't hold.
        """

    def grid(
        self, weight: Tensor, format: Format, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> Grid | None:
        """The grid that `quantize` rounds on, where rounding takes much longer; None elsewhere.

        Values that were rounded before find their codes on it.
        """
        return None

    def quantize_alike(
        self, weights: Sequence[Tensor], format: Format, statistics: Sequence[SiteStatistics]
    ) -> list[Quantized]:
        """`quantize` for weights of one shape, as the layers of a model have them.

        A quantizer whose steps are many and small takes them together.
        """
        pairs = zip(weights, statistics, strict=True)
        return [self.quantize(weight, format, known) for weight, known in pairs]


def needs(quantizer: Quantizer, format: Format) -> frozenset[Statistic]:
    """The statistics that a quantizer and a format work with together."""
    return quantizer.needs | format.needs


def rendering(quantizer: Quantizer) -> str:
    """What keys of banks and measurements say of a quantizer: its identity, in this revision."""
    return quantizer.identity if REVISION == 1 else f"{quantizer.identity}#{REVISION}"


def check_finite(weight: Tensor) -> None:
    """Raise `QuantizationError` if the weight holds NaN or infinity."""
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise QuantizationError(
            f"{bad} of {weight.numel()} weights are NaN or infinite; "
            "check the checkpoint, or keep this layer in bf16"
        )
