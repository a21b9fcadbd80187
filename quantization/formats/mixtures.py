"""Mixtures within a tensor: rows or columns, ranked by salience, in formats of their own.

A mixture is itself a scalar format. Its slices (single rows or columns, or whole groups of columns)
are laid out by rising salience and cut at fixed shares, so that bytes follow from the shape alone
and each part is contiguous: a kernel multiplies part by part. Stored are the parts as their formats
pack them and the places of all slices outside the largest part.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from quantization.formats.base import Fit, Grid, Packed, ScalarFormat
from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic


@dataclass(frozen=True)
class Part:
    """A share of the slices, in rising salience, and their format; a share of None is the rest."""

    format: ScalarFormat
    share: float | None = None


@dataclass(frozen=True)
class Mixture(ScalarFormat):
    """Slices along one dimension.

    Args:
        size: how many neighbouring rows or columns make a slice.
    """

    name: str
    parts: tuple[Part, ...]
    size: int = 1

    family = "mixture"
    batched = False  # each matrix of a stack has an order of its own
    dim = -1

    @abstractmethod
    def salience(self, weight: Tensor, statistics: SiteStatistics) -> Tensor:
        """What each slice loses when it is stored coarsely, `... x slices`."""

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        """The inputs' second moment, to rank by."""
        return frozenset({"second-moment"})

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Slices are whole, no part is empty, and each part's format applies to it."""
        if shape[self.dim] % self.size:
            return f"{shape[self.dim]} columns don't divide into groups of {self.size}"
        counts = self._counts(shape[self.dim] // self.size)
        if min(counts) < 1:
            return f"of {shape[self.dim] // self.size} slices, a part would get none"
        reasons = (p.format.refusal(s) for p, s in self.part_shapes(shape))
        return next((reason for reason in reasons if reason), None)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """The parts, and the places of all slices outside the largest."""
        slices = shape[self.dim] // self.size
        places = slices - max(self._counts(slices))
        matrices = 1
        for extent in shape[:-2]:
            matrices *= extent
        inside = sum(part.format.nbytes(s) for part, s in self.part_shapes(shape))
        return inside + matrices * places * _place_type(slices).itemsize

    def fit(self, weight: Tensor, statistics: SiteStatistics = NOTHING_KNOWN) -> Grid:
        """The order of the slices and the grids of the parts, their names behind the number."""
        return self.fit_parts(weight, statistics, lambda w, own, known: own.fit(w, known))

    def fit_parts(self, weight: Tensor, statistics: SiteStatistics, fit: Fit) -> Grid:
        """See `ScalarFormat.fit_parts`."""
        salience = self.salience(weight, statistics)
        order = salience.argsort(dim=-1, stable=True)
        edges = self._edges(order.shape[-1])
        pieces = [order[..., a:b].sort(-1).values for a, b in edges]  # neighbours stay neighbours
        order = torch.cat(pieces, -1)
        grid: Grid = {"order": order}
        for i, (part, piece) in enumerate(zip(self.parts, self._split(weight, grid), strict=True)):
            known = self._known(statistics, weight, grid, i)
            grid |= {f"{i}.{name}": t for name, t in fit(piece, part.format, known).items()}
        return grid

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """The parts' codes as float32, which holds all of them exactly, in the weight's order."""
        pieces = self._split(weight, grid)
        codes = [p.format.encode(w, g).float() for p, w, g in self._each(pieces, grid)]
        return self._joined(codes, grid)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Part by part, back in the weight's order."""
        pieces = self._split(codes, grid)
        return self._joined([p.format.decode(c, g) for p, c, g in self._each(pieces, grid)], grid)

    def pack(self, codes: Tensor, grid: Grid) -> Packed:
        """The parts' tensors behind their number, and the places."""
        tensors: Grid = {}
        for i, (part, piece, own) in enumerate(self._each(self._split(codes, grid), grid)):
            piece = piece if part.format.name == "bf16" else piece.to(torch.int16)
            piece = piece.to(torch.bfloat16) if part.format.name == "bf16" else piece
            packed = part.format.pack(piece, own).tensors
            tensors |= {f"{i}.{name}": tensor for name, tensor in packed.items()}
        slices = codes.shape[self.dim] // self.size
        largest = self._largest(slices)
        outside = [t for i, t in enumerate(self._pieces(grid)) if i != largest]
        places = torch.cat(outside, -1).to(_place_type(slices))
        return Packed(self.name, tuple(codes.shape), {**tensors, "places": places})

    def unpack(self, packed: Packed) -> tuple[Tensor, Grid]:
        """Undo `pack`."""
        grid: Grid = {"order": torch.cat(self.places(packed), -1)}
        pieces = []
        for i, (part, own) in enumerate(zip(self.parts, self.packed_parts(packed), strict=True)):
            codes, found = part.format.unpack(own)
            pieces.append(codes.float())
            grid |= {f"{i}.{name}": tensor for name, tensor in found.items()}
        return self._joined(pieces, grid), grid

    def places(self, packed: Packed) -> list[Tensor]:
        """Which slices each part holds, `... x slices of the part`."""
        slices = packed.shape[self.dim] // self.size
        counts, largest = self._counts(slices), self._largest(slices)
        stored = packed.tensors["places"].long()
        inside = torch.ones(*stored.shape[:-1], slices, dtype=torch.bool, device=stored.device)
        rest = inside.scatter(-1, stored, False).nonzero()[:, -1]
        pieces = list(stored.split([n for i, n in enumerate(counts) if i != largest], -1))
        pieces.insert(largest, rest.view(*stored.shape[:-1], counts[largest]))
        return pieces

    def packed_parts(self, packed: Packed) -> list[Packed]:
        """Each part as a packed tensor of its own format, without copying."""
        return [
            Packed(
                part.format.name,
                shape,
                {n[2:]: t for n, t in packed.tensors.items() if n.startswith(f"{i}.")},
            )
            for i, (part, shape) in enumerate(self.part_shapes(packed.shape))
        ]

    def _known(
        self, statistics: SiteStatistics, weight: Tensor, grid: Grid, part: int
    ) -> SiteStatistics:
        """The statistics of a part's slices; what doesn't split along them is left out."""
        fisher = statistics.fisher
        if fisher is not None:
            fisher = self._split(fisher.view(weight.shape), grid)[part]
        return SiteStatistics(fisher=fisher, importance=statistics.importance)

    def _counts(self, slices: int) -> list[int]:
        """Slices of each part."""
        counts = [0 if p.share is None else round(p.share * slices) for p in self.parts]
        rest = next(i for i, part in enumerate(self.parts) if part.share is None)
        counts[rest] = slices - sum(counts)
        return counts

    def _largest(self, slices: int) -> int:
        counts = self._counts(slices)
        return counts.index(max(counts))

    def _edges(self, slices: int) -> list[tuple[int, int]]:
        ends = list(accumulate(self._counts(slices)))
        return list(zip([0, *ends], ends, strict=False))

    def part_shapes(self, shape: tuple[int, ...]) -> Iterator[tuple[Part, tuple[int, ...]]]:
        """Each part and the shape of what it holds."""
        for part, count in zip(self.parts, self._counts(shape[self.dim] // self.size), strict=True):
            inside = list(shape)
            inside[self.dim] = count * self.size
            yield part, tuple(inside)

    def _ends(self, grid: Grid) -> list[int]:
        """Where each part ends in the order; a grid of taken columns has cuts of its own."""
        if "ends" in grid:
            return grid["ends"].tolist()
        return list(accumulate(self._counts(grid["order"].shape[-1])))

    def _pieces(self, grid: Grid) -> list[Tensor]:
        """The places of each part's slices."""
        ends = self._ends(grid)
        return [grid["order"][..., a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def _split(self, matrix: Tensor, grid: Grid) -> list[Tensor]:
        """The matrix's slices by part."""
        size = matrix.shape[self.dim] // grid["order"].shape[-1]
        return [
            torch.take_along_dim(matrix, _along(_spread(places, size), self.dim), self.dim)
            for places in self._pieces(grid)
        ]

    def _joined(self, pieces: list[Tensor], grid: Grid) -> Tensor:
        """Undo `_split`."""
        whole = torch.cat(pieces, self.dim)
        size = whole.shape[self.dim] // grid["order"].shape[-1]
        back = _spread(grid["order"], size).argsort(-1)
        return torch.take_along_dim(whole, _along(back, self.dim), self.dim)

    def _each(self, pieces: list[Tensor], grid: Grid) -> Iterator[tuple[Part, Tensor, Grid]]:
        """Part, its piece and its grid."""
        for i, (part, piece) in enumerate(zip(self.parts, pieces, strict=True)):
            yield part, piece, {n[2:]: t for n, t in grid.items() if n.startswith(f"{i}.")}


class RowMixture(Mixture):
    """Output channels."""

    dim = -2

    def take(self, grid: Grid, columns: Tensor, width: int) -> Grid:
        """Of each part."""
        taken: Grid = {"order": grid["order"]}
        for i, (part, _, own) in enumerate(self._each([grid["order"]] * len(self.parts), grid)):
            found = part.format.take(own, columns, width)
            taken |= {f"{i}.{name}": tensor for name, tensor in found.items()}
        return taken


class ColumnMixture(Mixture):
    """Input channels, or groups of them."""

    dim = -1

    def take(self, grid: Grid, columns: Tensor, width: int) -> Grid:
        """Of one matrix (no stack): each column from the part that it lies in."""
        size = width // grid["order"].shape[-1]
        positions = _spread(grid["order"], size).argsort()[columns]
        ends = [size * end for end in self._ends(grid)]
        pieces, taken = [], Grid()
        for i, (part, _, own) in enumerate(self._each([positions] * len(self.parts), grid)):
            first, last = ([0, *ends])[i], ends[i]
            chosen = ((positions >= first) & (positions < last)).nonzero()[:, 0]
            pieces.append(chosen)
            inside = part.format.take(own, positions[chosen] - first, last - first)
            taken |= {f"{i}.{name}": tensor for name, tensor in inside.items()}
        cuts = torch.tensor(list(accumulate(len(piece) for piece in pieces)))
        return {**taken, "order": torch.cat(pieces), "ends": cuts}

    def _known(
        self, statistics: SiteStatistics, weight: Tensor, grid: Grid, part: int
    ) -> SiteStatistics:
        """The importance of a part's columns as well."""
        known = super()._known(statistics, weight, grid, part)
        if statistics.importance is None:
            return known
        size = weight.shape[-1] // grid["order"].shape[-1]
        places = _spread(self._pieces(grid)[part], size)
        return replace(known, importance=torch.take_along_dim(statistics.importance, places, -1))


def _spread(places: Tensor, size: int) -> Tensor:
    """Places of slices as places of their rows or columns."""
    inside = torch.arange(size, device=places.device)
    return (places[..., None] * size + inside).flatten(-2)


def _along(places: Tensor, dim: int) -> Tensor:
    """Places (... x n) as an index along the last or the last but one dimension."""
    return places[..., None, :] if dim == -1 else places[..., :, None]


def _place_type(slices: int) -> torch.dtype:
    return torch.int16 if slices < 2**15 else torch.int32
