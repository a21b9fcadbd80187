"""GPTQ: columns are rounded one after another, and each error is made up for by those to come.

With H = E[x^T x] and U the upper Cholesky factor of (H + damping)^-1 (GPTQ, arXiv 2210.17323,
algorithm 1), column j is rounded, and its error spread over the columns that are still open:

    e = (w_j - Q(w_j)) / U_jj        W_:,j+1: -= e U_j,j+1:

Columns go in order of falling H_jj (activation order), on scales that are fitted beforehand, so
that groups stay where they are. Any scalar format will do: it only has to round single columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantization.errors import QuantizationError
from quantization.formats import Format, Grid, Rotated, ScalarFormat
from quantization.quantizers.base import Quantized, Quantizer, check_finite
from quantization.quantizers.clipping import clipped_grid
from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic

BLOCK = 64  # columns whose updates of the rest are gathered into one product
TOGETHER = 8  # matrices whose columns are rounded at once


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
        if not isinstance(format, (ScalarFormat, Rotated)):
            check_finite(weight)
            return Quantized(format, *format.nearest(weight.float(), statistics))
        if weight.dim() == 2:
            return self.quantize_alike([weight], format, [statistics])[0]
        found = self.quantize_alike(list(weight), format, statistics.each(len(weight)))
        grid = {name: torch.stack([q.grid[name] for q in found]) for name in found[0].grid}
        return Quantized(format, torch.stack([q.codes for q in found]), grid)

    def grid(
        self, weight: Tensor, format: Format, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> Grid | None:
        """See `Quantizer.grid`."""
        if weight.dim() > 2:
            return None
        if isinstance(format, Rotated):
            known = format.turned_statistics(statistics)
            return self.grid(format.turned(weight.float()), format.inner, known)
        if not isinstance(format, ScalarFormat):
            return None
        return clipped_grid(weight.float(), format, statistics)

    def quantize_alike(
        self, weights: Sequence[Tensor], format: Format, statistics: Sequence[SiteStatistics]
    ) -> list[Quantized]:
        """See `Quantizer.quantize_alike`: a column of all matrices is rounded at once."""
        if isinstance(format, Rotated) and weights[0].dim() == 2:
            for weight in weights:
                check_finite(weight)
            turned = [format.turned(weight.float()) for weight in weights]
            known = [format.turned_statistics(own) for own in statistics]
            inside = self.quantize_alike(turned, format.inner, known)
            return [replace(quantized, format=format) for quantized in inside]
        if not isinstance(format, ScalarFormat) or weights[0].dim() > 2:
            return super().quantize_alike(weights, format, statistics)
        found = []
        together = TOGETHER if format.batched else 1
        for start in range(0, len(weights), together):
            chosen = slice(start, start + together)
            found += self._quantize_stack(weights[chosen], format, statistics[chosen])
        return found

    def _quantize_stack(
        self, weights: Sequence[Tensor], format: ScalarFormat, statistics: Sequence[SiteStatistics]
    ) -> list[Quantized]:
        """Matrices of one shape, each with an order of its own."""
        for weight in weights:
            check_finite(weight)
        weights = [weight.float() for weight in weights]
        grids = [clipped_grid(w, format, s) for w, s in zip(weights, statistics, strict=True)]
        codes: list[Tensor | None] = [None] * len(weights)
        seen = [i for i, known in enumerate(statistics) if known.second_moment is not None]
        if seen:
            for i, own in zip(
                seen, self._moved(seen, weights, format, grids, statistics), strict=True
            ):
                codes[i] = own if format.joint else format.encode(own, grids[i])
        return [
            Quantized(format, format.encode(w, grid) if own is None else own, grid)
            for own, w, grid in zip(codes, weights, grids, strict=True)
        ]

    def _moved(
        self,
        seen: Sequence[int],
        weights: Sequence[Tensor],
        format: ScalarFormat,
        grids: Sequence[Grid],
        statistics: Sequence[SiteStatistics],
    ) -> list[Tensor]:
        """The weights of those with a second moment, as they are when their turn comes.

        Formats whose values are rounded jointly give their codes instead.
        """
        found = [self._order_and_factor(statistics[i], weights[i]) for i in seen]
        orders, factors = zip(*found, strict=True)
        triples = zip(seen, orders, strict=True)
        width = weights[0].shape[-1]
        taken = [format.take(grids[i], order, width) for i, order in triples]
        ordered = [weights[i][:, order] for i, order in zip(seen, orders, strict=True)]
        if len(seen) == 1:  # formats that aren't batched know no stacks
            swept = [_sweep(ordered[0], factors[0], format, taken[0])]
        else:
            grid = {name: torch.stack([own[name] for own in taken]) for name in taken[0]}
            swept = list(_sweep(torch.stack(ordered), torch.stack(factors), format, grid))
        return [own[:, order.argsort()] for own, order in zip(swept, orders, strict=True)]

    def _order_and_factor(
        self, statistics: SiteStatistics, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The columns' order and U in it; remembered, since every format asks for it."""
        if self.identity not in statistics.remembered:
            assert statistics.second_moment is not None
            moment = statistics.second_moment.to(weight)
            order = torch.arange(len(moment), device=weight.device)
            if self.activation_order:
                order = moment.diagonal().argsort(descending=True, stable=True)
            factor = inverse_factor(moment[order][:, order], self.damping).to(weight)
            statistics.remembered[self.identity] = order, factor
        return statistics.remembered[self.identity]


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
    """Weights that have made up for the errors before them, each as it was when rounded.

    Of joint formats, their codes.
    """
    width = weight.shape[-1]
    open_ = weight.clone()
    rounded: list[Tensor] = []
    for start in range(0, width, BLOCK):
        columns = torch.arange(start, min(start + BLOCK, width), device=weight.device)
        inside = format.take(grid, columns, width)
        block = open_[..., columns]
        upper = factor[..., start : start + BLOCK, start : start + BLOCK]
        errors = torch.empty_like(block)
        for j in range(len(columns)):
            values = block[..., j : j + 1]
            own = format.take(inside, columns[j : j + 1] - start, len(columns))
            codes = format.encode(values, own)
            nearest = format.decode(codes, own)
            rounded.append(codes if format.joint else values)
            error = (values - nearest) / upper[..., j, j, None, None]
            block[..., j + 1 :] -= error * upper[..., None, j, j + 1 :]
            errors[..., j : j + 1] = error
        rest = factor[..., start : start + BLOCK, start + BLOCK :]
        open_[..., start + BLOCK :] -= errors @ rest
    return torch.cat(rounded, -1)
