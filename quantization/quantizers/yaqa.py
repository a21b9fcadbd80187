"""YAQA: GPTQ's feedback between columns, and the same between rows, for the loss of the whole model.

To second order an error E of a weight costs tr(G E H E^T), with H = E[w x^T x] of the inputs, each
token with the weight w = |g|^2, and G = E[g^T g] of the gradients g by the outputs (K-FAC; YAQA,
arXiv 2505.22988, sections 3 and 4; GuidedQuant, 2505.07004, has the former alone). With
G = L D L^T (L unit lower) and H = U D' U^T (U unit upper) that is a weighted sum of squares of

    (L^T E U)_ij = E_ij + sum_{k>i} L_ki E_kj + sum_{l<j} (L^T E)_il U_lj

so row i, column j is rounded when the rows below and the columns before have been, after the two
sums were taken off. Values on a diagonal of the matrix wait for none of each other.

Sampled gradients are noisy and G is large: it is kept in blocks along its diagonal and damped as
much as its own mean. H is mixed in equal parts with the plain second moment, which has no noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantization.errors import QuantizationError
from quantization.formats import Format, Grid, Rotated, ScalarFormat
from quantization.quantizers.base import Quantized
from quantization.quantizers.gptq import GPTQ
from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic

TILE = 64  # rows and columns whose updates of the rest are gathered into products


@dataclass(frozen=True)
class YAQA(GPTQ):
    """Two-sided adaptive rounding; formats whose values share more than a row get GPTQ's under H.

    Args:
        output_damping: what is added to the diagonal of G, as a share of its mean.
    """

    name: str = "yaqa"
    output_damping: float = 1.0

    needs: frozenset[Statistic] = frozenset({"second-moment", "curvature"})

    @property
    def identity(self) -> str:
        """See `Quantizer.identity`."""
        order = "" if self.activation_order else ", order=natural"
        return f"{self.name}(damping={self.damping:g}, outputs={self.output_damping:g}{order})"

    def quantize(
        self, weight: Tensor, format: Format, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> Quantized:
        """See `Quantizer.quantize`; formats that round by themselves get H's diagonal to do so."""
        moved = isinstance(format, (ScalarFormat, Rotated))
        known = statistics if moved else _guided(statistics)
        return super().quantize(weight, format, known)

    def grid(
        self, weight: Tensor, format: Format, statistics: SiteStatistics = NOTHING_KNOWN
    ) -> Grid | None:
        """See `Quantizer.grid`."""
        return super().grid(weight, format, _guided(statistics))

    def quantize_alike(
        self, weights: Sequence[Tensor], format: Format, statistics: Sequence[SiteStatistics]
    ) -> list[Quantized]:
        """See `Quantizer.quantize_alike`; H is turned for rotated formats, and not what it is made of."""
        if isinstance(format, Rotated):
            statistics = [_guided(known) for known in statistics]
        return super().quantize_alike(weights, format, statistics)

    def _quantize_stack(
        self, weights: Sequence[Tensor], format: ScalarFormat, statistics: Sequence[SiteStatistics]
    ) -> list[Quantized]:
        """Under H."""
        return super()._quantize_stack(weights, format, [_guided(known) for known in statistics])

    def _moved(
        self,
        seen: Sequence[int],
        weights: Sequence[Tensor],
        format: ScalarFormat,
        grids: Sequence[Grid],
        statistics: Sequence[SiteStatistics],
    ) -> list[Tensor]:
        """The weights of those with a second moment, as they are when their turn comes."""
        if not format.rowwise or any(statistics[i].output_curvature is None for i in seen):
            return super()._moved(seen, weights, format, grids, statistics)
        inputs = [self._columns_and_upper(statistics[i], weights[i]) for i in seen]
        outputs = [self._rows_and_lower(statistics[i], weights[i]) for i in seen]
        own = [(weights[i], grids[i]) for i in seen]
        return _swept(own, format, inputs, outputs)

    def _columns_and_upper(
        self, statistics: SiteStatistics, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The columns in falling H_jj, and U in that order."""
        assert statistics.second_moment is not None
        key = f"{self.identity}, inputs"
        if key not in statistics.remembered:
            moment = statistics.second_moment.to(weight)
            order = torch.arange(len(moment), device=weight.device)
            if self.activation_order:
                order = moment.diagonal().argsort(descending=True, stable=True)
            backwards = order.flip(0)
            lower = unit_lower(moment[backwards][:, backwards], self.damping)
            statistics.remembered[key] = order, lower.flip(0, 1).float()
        return statistics.remembered[key]

    def _rows_and_lower(self, statistics: SiteStatistics, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of each block in rising G_ii (K x B, numbered in the matrix), and L in it."""
        key = f"{self.identity}, outputs"
        if key not in statistics.remembered:
            assert statistics.output_curvature is not None
            curvature = statistics.output_curvature.to(weight)
            order = curvature.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, stable=True)
            inside = torch.take_along_dim(curvature, order[:, :, None], 1)
            inside = torch.take_along_dim(inside, order[:, None, :], 2)
            first = torch.arange(len(order), device=order.device) * order.shape[1]
            each = [unit_lower(block, self.output_damping).float() for block in inside]
            lower = torch.stack(each)  # one by one: a head has many, and they are float64
            statistics.remembered[key] = order + first[:, None], lower
        return statistics.remembered[key]


def _guided(known: SiteStatistics) -> SiteStatistics:
    """Statistics whose second moment is H; its diagonal is the importance, unless one was imported."""
    if known.second_moment is None or known.input_curvature is None:
        return known
    if "guided" not in known.remembered:
        plain, curved = known.second_moment, known.input_curvature.to(known.second_moment)
        mixed = plain / _mean(plain) + curved / _mean(curved)
        importance = known.importance
        if importance is None or torch.equal(importance, _diagonal(plain)):
            importance = _diagonal(mixed).contiguous()
        known.remembered["guided"] = replace(
            known, second_moment=mixed, input_curvature=None, importance=importance
        )
    guided: SiteStatistics = known.remembered["guided"]
    return guided


def _diagonal(moment: Tensor) -> Tensor:
    return moment.diagonal(dim1=-2, dim2=-1)


def _mean(moment: Tensor) -> Tensor:
    return _diagonal(moment).mean(-1)[..., None, None].clamp(min=1e-30)


def unit_lower(moment: Tensor, damping: float) -> Tensor:
    """L with L D L^T = H + damping mean(diag H) I, D diagonal, for a stack of them, in float64.

    What is always zero (inputs that nobody has seen, rows that fill a block up) doesn't count in the mean.

    Raises:
        QuantizationError: H isn't positive definite even with a hundred times the damping.
    """
    moment = moment.double()
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    mean = (diagonal.sum(-1) / (diagonal != 0).sum(-1).clamp(min=1))[..., None, None]
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    for _ in range(3):
        lower, failed = torch.linalg.cholesky_ex(moment + (damping * mean + 1e-30) * eye)
        if not failed.any():
            return lower / lower.diagonal(dim1=-2, dim2=-1)[..., None, :]
        damping *= 10
    raise QuantizationError(
        f"a curvature isn't positive definite with {damping / 10:g} of its mean added; calibrate "
        "with more text, or use the quantizer rtn-weighted"
    )


def _swept(
    matrices: Sequence[tuple[Tensor, Grid]],
    format: ScalarFormat,
    inputs: Sequence[tuple[Tensor, Tensor]],
    outputs: Sequence[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """Matrices of one shape, and their grids: each value as it was when it was rounded.

    Legend: M matrices, K blocks of B rows, C columns; rows and columns in their orders.
    """
    rows = len(matrices[0][0])
    laid = zip(matrices, inputs, outputs, strict=True)
    exact, grids = zip(*(_laid_out(*m, format, c, r) for m, (c, _), (r, _) in laid), strict=True)
    exact_MKBC = torch.stack(exact)
    grid = {name: torch.stack([own[name] for own in grids]) for name in grids[0]}
    upper_MKCC = torch.stack([upper for _, upper in inputs])[:, None]
    lower_MKBB = torch.stack([lower for _, lower in outputs])
    errors_MKBC = torch.zeros_like(exact_MKBC)  # of the values before they were moved
    moved_MKBC = torch.empty_like(exact_MKBC)
    height = exact_MKBC.shape[2]
    for start in reversed(range(0, height, TILE)):
        tile = slice(start, min(start + TILE, height))
        below_MKTC = lower_MKBB[:, :, tile.stop :, tile].mT @ errors_MKBC[:, :, tile.stop :]
        _sweep_rows(
            exact_MKBC[:, :, tile], format, {n: t[:, :, tile] for n, t in grid.items()},
            lower_MKBB[:, :, tile, tile], upper_MKCC, below_MKTC,
            errors_MKBC[:, :, tile], moved_MKBC[:, :, tile],
        )  # fmt: skip
    return [
        moved.flatten(0, 1)[r.flatten().argsort()[:rows]][:, c.argsort()]
        for moved, (c, _), (r, _) in zip(moved_MKBC, inputs, outputs, strict=True)
    ]


def _laid_out(
    weight: Tensor, grid: Grid, format: ScalarFormat, columns_C: Tensor, rows_KB: Tensor
) -> tuple[Tensor, Grid]:
    """A matrix as K x B x C, and its grid; a short last block is filled up with the last row."""
    rows, width = weight.shape
    kept = rows_KB.clamp(max=rows - 1).flatten()
    taken = format.take(grid, columns_C, width)
    laid = {name: t[kept].view(*rows_KB.shape, *t.shape[1:]) for name, t in taken.items()}
    return weight[kept][:, columns_C].view(*rows_KB.shape, width), laid


def _sweep_rows(
    exact: Tensor,
    format: ScalarFormat,
    grid: Grid,
    lower: Tensor,
    upper: Tensor,
    below: Tensor,
    errors: Tensor,
    moved: Tensor,
) -> None:
    """Fill `errors` and `moved` (... x T x C) of T rows, a tile of columns after the other.

    `below` (... x T x C) is what the rows below add to L^T E.
    """
    height, width = exact.shape[-2:]
    passed = torch.zeros_like(exact)  # (L^T E), as far as it is known
    strict = lower.tril(-1).contiguous()
    every = torch.arange(width, device=exact.device)
    for start in range(0, width, TILE):
        stop = min(start + TILE, width)
        inside = format.take(grid, every[start:stop], width)
        rest = below[..., start:stop].contiguous()
        before = passed[..., :start] @ upper[..., :start, start:stop]
        right = upper[..., start:stop, start:stop].triu(1).contiguous()
        own = exact[..., start:stop].contiguous()
        error, through, target = (torch.zeros_like(own) for _ in range(3))
        for offset in range(1 - height, stop - start):
            rows = slice(max(0, -offset), min(height, stop - start - offset))
            columns = slice(rows.start + offset, rows.stop + offset)

            def on(tensor: Tensor, offset: int = offset) -> Tensor:
                return tensor.diagonal(offset, -2, -1)

            below_here = on(rest)
            wanted = on(own) - below_here - on(before)
            single = format.on_diagonal(inside, offset, rows)
            nearest = format.decode(format.encode(wanted[..., None], single), single)[..., 0]
            wrong = nearest - on(own)
            both = wrong + below_here
            on(target).copy_(wanted)
            on(error).copy_(wrong)
            on(through).copy_(both)
            rest[..., columns].addcmul_(strict[..., rows, :].mT, wrong[..., None, :])
            before[..., rows, :].addcmul_(right[..., columns, :], both[..., None])
        errors[..., start:stop], moved[..., start:stop] = error, target
        passed[..., start:stop] = through
