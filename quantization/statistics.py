"""What calibration knows of a site: statistics of its inputs and of the loss's gradients."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Statistic = Literal["second-moment", "fisher"]


@dataclass(frozen=True)
class SiteStatistics:
    """A site's statistics; what is None isn't known.

    Args:
        second_moment: E[x^T x] of the inputs, `... x columns x columns`, one an expert.
        importance: E[x^2] of the inputs, `... x columns`: its diagonal, or an imported imatrix.
        fisher: E[g^2] of the loss's gradient by each weight, `... x rows x columns`.
    """

    second_moment: Tensor | None = None
    importance: Tensor | None = None
    fisher: Tensor | None = None


NOTHING_KNOWN = SiteStatistics()
