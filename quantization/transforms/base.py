"""The contract of a transform: which scale each fold of a model gets."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from quantization.formats import Format
from quantization.statistics import SiteStatistics
from quantization.transforms.folds import Fold

FLOOR = 1e-4  # of the largest magnitude: a channel that is never used shall not divide by nothing


class Transform(ABC):
    """Chooses the scales of folds. Stateless; `identity` enters the folded model's hash.

    Attributes:
        tuned: whether the scales depend on a format.
    """

    name: str
    tuned: bool = False

    @property
    def identity(self) -> str:
        """Name and every setting that changes the result."""
        return self.name

    @abstractmethod
    def scale(
        self,
        fold: Fold,
        weights: Sequence[Tensor],
        statistics: Sequence[SiteStatistics],
        format: Format | None,
    ) -> Tensor:
        """The scale of each channel of a fold.

        Args:
            fold: what is scaled.
            weights: of the fold's sites, ... x rows x columns in float32.
            statistics: of the fold's sites in the unscaled model, with second moments.
            format: what the scales are tuned to, if the transform is tuned.

        Returns:
            channels, or experts x channels where experts have scales of their own; above zero.
        """


def magnitude(fold: Fold, statistics: Sequence[SiteStatistics]) -> Tensor:
    """How large the inputs of each channel are: the root of E[x^2], averaged over its readers.

    Papers take the mean or the maximum of |x|; the second moment is what calibration keeps, and
    lies between them. Channels of inputs that were never seen count as equally large.
    """
    pooled = [fold.pooled(known.importance) for known in statistics if known.importance is not None]
    return floored(torch.cat(pooled).float().mean(0).sqrt())


def floored(values: Tensor) -> Tensor:
    """Non-negative values raised to `FLOOR` of their largest; ones where all are zero."""
    largest = values.amax(-1, keepdim=True)
    return torch.where(largest > 0, values.maximum(FLOOR * largest), 1.0)
