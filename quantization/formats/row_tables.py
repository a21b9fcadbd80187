"""Row tables: each row has 2^b values of its own, placed by weighted k-means (SqueezeLLM).

SqueezeLLM (arXiv 2306.07629, equation 2) clusters each output channel with the diagonal Fisher
information as sample weights, so that the values lie where an error costs. In one dimension with
sorted values, a step of Lloyd's algorithm is a search for the middles and a difference of prefix
sums, so all rows run at once.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from quantization.errors import QuantizationError
from quantization.formats.base import Grid, Packed, ScalarFormat
from quantization.packing import pack_bits, packed_bytes, unpack_bits
from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic

ITERATIONS = 50  # the paper's implementation; later steps move nothing
SMOOTHED = 9  # neighbours; estimates of the Fisher information are noisy
ROWS_A_STEP = 256  # prefix sums are float64


@dataclass(frozen=True)
class RowTables(ScalarFormat):
    """Tables of 2^bits float16 values a row, without scales."""

    bits: int

    family = "table"
    rowwise = True
    needs: frozenset[Statistic] = frozenset({"fisher"})

    @property
    def name(self) -> str:  # type: ignore[override]
        """`squeezellm4`."""
        return f"squeezellm{self.bits}"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """A bit stream and a table a row."""
        *leading, columns = shape
        return prod(leading) * (packed_bytes(columns, self.bits) + 2 * 2**self.bits)

    def fit(self, weight: Tensor, statistics: SiteStatistics = NOTHING_KNOWN) -> Grid:
        """Tables `... x rows x 2^bits`, rising."""
        rows = weight.flatten(0, -2)
        loss = statistics.fisher
        loss = torch.ones_like(rows) if loss is None else loss.to(rows).flatten(0, -2)
        tables = [
            weighted_kmeans(rows[i : i + ROWS_A_STEP], loss[i : i + ROWS_A_STEP], 2**self.bits)
            for i in range(0, len(rows), ROWS_A_STEP)
        ]
        table = torch.cat(tables).half()
        if not table.isfinite().all():
            raise QuantizationError(
                f"weights reach {weight.abs().max().item():.3g}, above the 65504 that a float16 "
                "table holds; keep this layer in bf16"
            )
        return {"tables": table.view(*weight.shape[:-1], 2**self.bits)}

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """Indices (int16) of the nearest values."""
        tables = grid["tables"].float()
        middles = (tables[..., 1:] + tables[..., :-1]) / 2
        return torch.searchsorted(middles, weight.contiguous()).to(torch.int16)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Look the values up."""
        return grid["tables"].float().gather(-1, codes.long())

    def take(self, grid: Grid, columns: Tensor, width: int) -> Grid:
        """A row's table serves all its columns."""
        return grid

    def on_diagonal(self, taken: Grid, offset: int, rows: slice) -> Grid:
        """See `ScalarFormat.on_diagonal`: the rows' tables."""
        return {"tables": taken["tables"][..., rows, :]}

    def pack(self, codes: Tensor, grid: Grid) -> Packed:
        """A bit stream and float16 values a row."""
        tensors = {"codes": pack_bits(codes, self.bits), "tables": grid["tables"]}
        return Packed(self.name, tuple(codes.shape), tensors)

    def unpack(self, packed: Packed) -> tuple[Tensor, Grid]:
        """Undo `pack`."""
        codes = unpack_bits(packed.tensors["codes"], self.bits, packed.shape[-1])
        return codes, {"tables": packed.tensors["tables"]}


def weighted_kmeans(values: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Cluster each row of `values` (rows x n) under `weights`; rising centres, rows x clusters.

    Lloyd's algorithm ends near where it starts. The best density of many centres goes with the
    cube root of weight times probability (Panter and Dite, 1951), and a gap d between neighbours
    says that the probability is 1 / d: so starts at even steps of the sum of w^(1/3) d^(2/3), with
    the weights as they are and smoothed, beside even steps over the range. The best end is kept.
    """
    values, order = values.double().contiguous().sort(-1)
    weights = weights.double().gather(-1, order)
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1.0)
    sums = [
        torch.nn.functional.pad((weights * values**power).cumsum(-1), (1, 0)) for power in range(3)
    ]
    places = (torch.arange(clusters, device=values.device) + 0.5) / clusters
    low, high = values[:, :1], values[:, -1:]
    smooth = torch.nn.functional.avg_pool1d(
        weights[:, None], SMOOTHED, 1, SMOOTHED // 2, count_include_pad=False
    )[:, 0]
    starts = [low + (high - low) * places, *(_even(values, w, places) for w in (weights, smooth))]
    ends = [_lloyd(values, sums, start) for start in starts]
    best = torch.stack([error for _, error in ends]).argmin(0)
    centres = torch.stack([centre for centre, _ in ends])
    return centres[best, torch.arange(len(values), device=values.device)]


def _even(values: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """The values at even steps of the best density's integral."""
    gaps = torch.nn.functional.pad(values.diff(dim=-1), (1, 1))
    gaps = (gaps[:, 1:] + gaps[:, :-1]) / 2
    mass = (weights ** (1 / 3) * gaps ** (2 / 3)).cumsum(-1)
    wanted = mass[:, -1:] * places
    found = torch.searchsorted(mass, wanted).clamp(max=values.shape[-1] - 1)
    return values.gather(-1, found)


def _lloyd(values: Tensor, sums: list[Tensor], centres: Tensor) -> tuple[Tensor, Tensor]:
    """Centres (float32) and the weighted squared error of each row."""

    def within(centres: Tensor) -> list[Tensor]:
        middles = ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous()
        inner = torch.searchsorted(values, middles)
        first, last = (
            inner.new_zeros(len(inner), 1),
            inner.new_full((len(inner), 1), values.shape[1]),
        )
        edges = torch.cat([first, inner, last], -1)
        return [total.gather(-1, edges).diff(dim=-1) for total in sums]

    for _ in range(ITERATIONS):
        mass, first, _ = within(centres)
        moved = torch.where(mass > 0, first / mass.clamp(min=1e-300), centres)
        if torch.equal(moved, centres):
            break
        centres = moved.sort(-1).values
    mass, first, second = within(centres)
    error = (second - 2 * centres * first + centres**2 * mass).sum(-1)
    return centres.float(), error
