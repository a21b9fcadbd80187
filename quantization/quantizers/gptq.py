"""GPTQ: columns are rounded one after another, and each error is made up for by those to come.

With H = E[x^T x] and U the upper Cholesky factor of (H + damping)^-1 (GPTQ, arXiv 2210.17323,
algorithm 1), column j is rounded, and its error spread over the columns that are still open:

    e = (w_j - Q(w_j)) / U_jj        W_:,j+1: -= e U_j,j+1:

Columns go in order of falling H_jj (activation order), on scales that are fitted beforehand, so
that groups stay where they are. Any scalar format will do: it only has to round single columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantization.errors import QuantizationError
from quantization.formats import Format, ScalarFormat
from quantization.quantizers.base import Quantized, Quantizer, check_finite
from quantization.quantizers.clipping import clipped_grid
from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic

BLOCK = 128  # columns whose updates of the rest are gathered into one product


@dataclass(frozen=True)
class GPTQ(Quantizer):
    """GPTQ on the grid of the weighted clipping search.

    Args:
        damping: what is added to the diagonal of H, as a share of its mean.
        activation_order: columns of large inputs first.
    """

    name: str = "gptq"
    damping: float = 0.01
    activation_order: bool = True

    needs: frozenset[Statistic] = frozenset({"second-moment"})

    @property
    def identity(self) -> str:
        """See `Quantizer.identity`."""
        order = "activation" if self.activation_order else "natural"
        return f"{self.name}(damping={self.damping:g}, order={order})"

    def quantize(
        self, weight: Tensor, format: Format, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> Quantized:
        """See `Quantizer.quantize`; rounds to nearest where no input was seen."""
        check_finite(weight)
        weight = weight.float()
        if not isinstance(format, ScalarFormat):
            return Quantized(format, *format.nearest(weight, statistics))
        if weight.dim() > 2 and not format.batched:
            return self._one_by_one(weight, format, statistics)
        grid = clipped_grid(weight, format, statistics)
        if statistics.second_moment is None:
            return Quantized(format, format.encode(weight, grid), grid)
        moment, width = statistics.second_moment.to(weight), weight.shape[-1]
        order = torch.arange(width, device=weight.device)
        if self.activation_order:  # one order for a stack, so that it goes in one batch
            diagonal = moment.diagonal(dim1=-2, dim2=-1).reshape(-1, width)
            order = diagonal.mean(0).argsort(descending=True)
        factor = inverse_factor(moment[..., order, :][..., order], self.damping).to(weight)
        moved = _sweep(weight[..., order], factor, format, format.take(grid, order, width))
        return Quantized(format, format.encode(moved[..., order.argsort()], grid), grid)

    def _one_by_one(
        self, weight: Tensor, format: ScalarFormat, statistics: SiteStatistics
    ) -> Quantized:
        """Each matrix of a stack by itself."""
        found = []
        for i, matrix in enumerate(weight):
            own = {name: None if t is None else t[i] for name, t in vars(statistics).items()}
            found.append(self.quantize(matrix, format, SiteStatistics(**own)))
        grid = {name: torch.stack([q.grid[name] for q in found]) for name in found[0].grid}
        return Quantized(format, torch.stack([q.codes for q in found]), grid)


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """U with U^T U = (H + damping mean(diag H) I)^-1, upper triangular, in float64.

    Inputs that are always zero get a diagonal of one: nothing is spread from or to them.

    Raises:
        QuantizationError: H isn't positive definite even with a hundred times the damping.
    """
    moment = moment.double()
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    dead = (diagonal == 0).double()
    mean = diagonal.mean(-1, keepdim=True)
    for _ in range(3):
        damped = moment + torch.diag_embed(dead + damping * mean + 1e-30)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed.any():
                return upper
        damping *= 10
    raise QuantizationError(
        f"the second moment of the inputs isn't positive definite with {damping / 10:g} of its "
        "mean added; calibrate with more text, or use the quantizer rtn-weighted"
    )


def _sweep(weight: Tensor, factor: Tensor, format: ScalarFormat, grid: dict[str, Tensor]) -> Tensor:
    """Weights that have made up for the errors before them, each as it was when rounded."""
    width = weight.shape[-1]
    open_, rounded = weight.clone(), torch.empty_like(weight)
    for start in range(0, width, BLOCK):
        columns = torch.arange(start, min(start + BLOCK, width), device=weight.device)
        inside = format.take(grid, columns, width)
        block = open_[..., columns]
        upper = factor[..., start : start + BLOCK, start : start + BLOCK]
        errors = torch.empty_like(block)
        for j in range(len(columns)):
            values = block[..., j : j + 1]
            own = format.take(inside, columns[j : j + 1] - start, len(columns))
            nearest = format.decode(format.encode(values, own), own)
            rounded[..., start + j : start + j + 1] = values
            error = (values - nearest) / upper[..., j, j, None, None]
            block[..., j + 1 :] -= error * upper[..., None, j, j + 1 :]
            errors[..., j : j + 1] = error
        rest = factor[..., start : start + BLOCK, start + BLOCK :]
        open_[..., start + BLOCK :] -= errors @ rest
    return rounded
