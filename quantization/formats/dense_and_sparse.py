"""Dense and sparse: a format for all weights but a fixed share of outliers kept in float16.

SqueezeLLM (arXiv 2306.07629, section 4.2) takes out what lies far outside the quartiles of its
matrix and, a ninth as many, the weights of largest Fisher information; the dense format is then
fitted to what is left. Outliers are stored by rows (CSR): a value, a column, and a pointer a row.
The count is a share of the shape, so that bytes are known before the weights are.
"""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from quantization.errors import QuantizationError
from quantization.formats.base import Fit, Grid, Packed, ScalarFormat
from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic

SENSITIVE = 1 / 9  # 0.05 % of 0.45 %


@dataclass(frozen=True)
class DenseAndSparse(ScalarFormat):
    """`dense` with `percent` of the weights kept aside."""

    dense: ScalarFormat
    percent: float

    @property
    def name(self) -> str:  # type: ignore[override]
        """`squeezellm4@0.45%`."""
        return f"{self.dense.name}@{self.percent:g}%"

    @property
    def family(self) -> str:  # type: ignore[override]
        """That of the dense format, and sparse."""
        return f"{self.dense.family}+sparse"

    @property
    def rowwise(self) -> bool:  # type: ignore[override]
        """As the dense format."""
        return self.dense.rowwise

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        """Fisher information finds the sensitive weights."""
        return self.dense.needs | {"fisher"}

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """As the dense format."""
        return self.dense.refusal(shape)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """The dense part; a float16 and an index an outlier; four bytes a row and one more."""
        *leading, rows, columns = shape
        sparse = self._count(shape) * (2 + _index_type(columns).itemsize) + 4 * (rows + 1)
        return self.dense.nbytes(shape) + prod(leading) * sparse

    def fit(self, weight: Tensor, statistics: SiteStatistics = NOTHING_KNOWN) -> Grid:
        """Find outliers, fit the rest without them."""
        return self.fit_parts(weight, statistics, lambda w, own, known: own.fit(w, known))

    def fit_parts(self, weight: Tensor, statistics: SiteStatistics, fit: Fit) -> Grid:
        """See `ScalarFormat.fit_parts`."""
        places = self._outliers(weight, statistics.fisher)
        flat = weight.flatten(-2)
        middle = flat.median(-1, keepdim=True).values.expand_as(places)
        rest = flat.scatter(-1, places, middle).view(weight.shape)
        fisher = statistics.fisher
        if fisher is not None:
            none = torch.zeros_like(places, dtype=fisher.dtype)
            fisher = fisher.flatten(-2).scatter(-1, places, none).view(weight.shape)
        grid = fit(rest, self.dense, replace(statistics, fisher=fisher))
        kept = flat.gather(-1, places).half()
        if not kept.isfinite().all():
            raise QuantizationError(
                f"outliers reach {flat.abs().max().item():.3g}, above float16's 65504; "
                "keep this layer in bf16"
            )
        return {**grid, "outlier_places": places, "outlier_values": kept}

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """The dense format's codes everywhere."""
        return self.dense.encode(weight, grid)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Dense values with the outliers in their places."""
        values, kept = self.dense.decode(codes, grid), grid["outlier_values"].float()
        if "outlier_mask" in grid:
            return torch.where(grid["outlier_mask"], kept, values)
        return values.flatten(-2).scatter(-1, grid["outlier_places"], kept).view(codes.shape)

    def take(self, grid: Grid, columns: Tensor, width: int) -> Grid:
        """See `ScalarFormat.take`: outliers of these columns as a mask and a matrix of values."""
        taken = self.dense.take(grid, columns, width)
        kept = grid["outlier_values"]
        if "outlier_mask" in grid:
            mask = grid["outlier_mask"]
        else:
            places = grid["outlier_places"]
            rows = next(t.shape[-2] for name, t in taken.items() if not name.startswith("outlier"))
            empty = kept.new_zeros(*places.shape[:-1], rows * width)
            mask = empty.bool().scatter(-1, places, True).unflatten(-1, (rows, width))
            kept = empty.scatter(-1, places, kept).unflatten(-1, (rows, width))
        kept, mask = kept.index_select(-1, columns), mask.index_select(-1, columns)
        return {**taken, "outlier_mask": mask, "outlier_values": kept}

    def on_diagonal(self, taken: Grid, offset: int, rows: slice) -> Grid:
        """See `ScalarFormat.on_diagonal`."""
        kept = {name: t for name, t in taken.items() if name.startswith("outlier")}
        dense = {name: t for name, t in taken.items() if name not in kept}
        single = self.dense.on_diagonal(dense, offset, rows)
        return {**single, **super().on_diagonal(kept, offset, rows)}

    def pack(self, codes: Tensor, grid: Grid) -> Packed:
        """CSR beside the dense format's tensors."""
        *_, rows, columns = codes.shape
        places = grid["outlier_places"]
        edges = torch.arange(rows + 1, device=places.device) * columns
        pointers = torch.searchsorted(places, edges.expand(*places.shape[:-1], -1).contiguous())
        tensors = {
            **self.dense.pack(codes, grid).tensors,
            "outlier_values": grid["outlier_values"],
            "outlier_columns": (places % columns).to(_index_type(columns)),
            "outlier_rows": pointers.to(torch.int32),
        }
        return Packed(self.name, tuple(codes.shape), tensors)

    def unpack(self, packed: Packed) -> tuple[Tensor, Grid]:
        """Undo `pack`."""
        columns = packed.shape[-1]
        codes, grid = self.dense.unpack(replace(packed, format=self.dense.name))
        inside = packed.tensors["outlier_columns"].long()
        if columns <= 2**16:
            inside %= 2**16  # int16 stands for what torch has no good support of
        pointers = packed.tensors["outlier_rows"].long()
        count = torch.arange(inside.shape[-1], device=inside.device)
        ranks = count.expand(inside.shape).contiguous()
        rows = torch.searchsorted(pointers.contiguous(), ranks, right=True) - 1
        places = rows * columns + inside
        return codes, {
            **grid,
            "outlier_places": places,
            "outlier_values": packed.tensors["outlier_values"],
        }

    def _count(self, shape: tuple[int, ...]) -> int:
        """Outliers of one matrix."""
        return round(self.percent / 100 * shape[-2] * shape[-1])

    def _outliers(self, weight: Tensor, fisher: Tensor | None) -> Tensor:
        """Their flat places in each matrix, rising: `... x count`."""
        flat, count = weight.flatten(-2), self._count(tuple(weight.shape))
        sensitive = 0 if fisher is None else round(SENSITIVE * count)
        sample = flat[..., :: max(1, flat.shape[-1] // 2**20)]  # quartiles of a million are exact
        quartiles = sample.sort(-1).values
        low = quartiles[..., quartiles.shape[-1] // 4, None]
        high = quartiles[..., 3 * quartiles.shape[-1] // 4, None]
        beyond = torch.maximum(flat - high, low - flat)
        if sensitive:
            assert fisher is not None
            first = fisher.flatten(-2).topk(sensitive, -1).indices
            beyond = beyond.scatter(-1, first, torch.inf)
        return beyond.topk(count, -1).indices.sort(-1).values


def _index_type(columns: int) -> torch.dtype:
    return torch.int16 if columns <= 2**16 else torch.int32
