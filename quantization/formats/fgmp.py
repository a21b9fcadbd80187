"""FGMP: blocks of 16 in FP8 or NVFP4 (arXiv 2504.14152).

A block's impact is what the coarser format would cost, sum g^2 (Q4(w) - Q8(w))^2 (equation 6); the
blocks of largest impact are stored as E4M3 under one float32 scale, the others as NVFP4, with one
bit a block to tell: share8 x 8 + (1 - share8) x 4.5 + 1/16 bits. No GPU multiplies such blocks
without unpacking them first.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from quantization.formats.base import Grid, Packed, ScalarFormat
from quantization.packing import pack_bits, packed_bytes, unpack_bits
from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic

BLOCK = 16


@dataclass(frozen=True)
class FGMP(ScalarFormat):
    """Args: percent of blocks in FP8; the two formats that share the work."""

    percent: float
    coarse: ScalarFormat
    fine: ScalarFormat

    family = "mixture"
    needs: frozenset[Statistic] = frozenset({"fisher"})

    @property
    def name(self) -> str:  # type: ignore[override]
        """`fgmp@30%`."""
        return f"fgmp@{self.percent:g}%"

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Blocks are whole."""
        return self.coarse.refusal(shape)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """A bit a block; 16 bytes or 9; a float32 scale for each kind."""
        *leading, rows, columns = shape
        fine = self._count(shape)
        coarse = rows * columns // BLOCK - fine
        mask = rows * packed_bytes(columns // BLOCK, 1)
        return prod(leading) * (mask + 16 * fine + 9 * coarse + 8)

    def fit(self, weight: Tensor, statistics: SiteStatistics = NOTHING_KNOWN) -> Grid:
        """Both grids, and the mask of FP8 blocks (... x rows x blocks)."""
        four, eight = self.coarse.fit(weight), self.fine.fit(weight)
        values = [
            f.decode(f.encode(weight, g), g) for f, g in ((self.coarse, four), (self.fine, eight))
        ]
        impact = (values[0] - values[1]).square_()
        if statistics.fisher is not None:
            impact *= statistics.fisher.to(impact)
        impact = impact.unflatten(-1, (-1, BLOCK)).sum(-1)
        chosen = impact.flatten(-2).topk(self._count(tuple(weight.shape)), -1).indices
        mask = torch.zeros_like(impact, dtype=torch.bool).flatten(-2).scatter(-1, chosen, True)
        return {
            "mask": mask.view(impact.shape),
            **{f"4.{name}": tensor for name, tensor in four.items()},
            **{f"8.{name}": tensor for name, tensor in eight.items()},
        }

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """Bit patterns of either format."""
        mask = _spread(grid["mask"], weight.shape[-1])
        coarse = self.coarse.encode(weight, _own(grid, "4."))
        return torch.where(mask, self.fine.encode(weight, _own(grid, "8.")), coarse)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Values of either format."""
        mask = _spread(grid["mask"], codes.shape[-1])
        coarse = self.coarse.decode(codes & 15, _own(grid, "4."))
        return torch.where(mask, self.fine.decode(codes, _own(grid, "8.")), coarse)

    def take(self, grid: Grid, columns: Tensor, width: int) -> Grid:
        """See `ScalarFormat.take`."""
        blocks = columns // (width // grid["mask"].shape[-1])
        four = self.coarse.take(_own(grid, "4."), columns, width)
        eight = self.fine.take(_own(grid, "8."), columns, width)
        return {
            "mask": grid["mask"].index_select(-1, blocks),
            **{f"4.{name}": tensor for name, tensor in four.items()},
            **{f"8.{name}": tensor for name, tensor in eight.items()},
        }

    def pack(self, codes: Tensor, grid: Grid) -> Packed:
        """The mask, then the blocks of each kind in the order of the rows."""
        blocks, mask = codes.unflatten(-1, (-1, BLOCK)), grid["mask"]
        leading = codes.shape[:-2]
        tensors = {
            "mask": pack_bits(mask.to(torch.int16), 1),
            "fine": blocks[mask].to(torch.uint8).view(*leading, -1, BLOCK),
            "coarse": pack_bits(blocks[~mask], 4).view(*leading, -1, BLOCK // 2),
            "coarse_scales": grid["4.scales"].view(torch.uint8)[~mask].view(*leading, -1),
            "coarse_tensor_scale": grid["4.tensor_scale"],
            "fine_scale": grid["8.scales"],
        }
        return Packed(self.name, tuple(codes.shape), tensors)

    def unpack(self, packed: Packed) -> tuple[Tensor, Grid]:
        """Undo `pack`; scales of FP8 blocks, which nobody reads, become zero."""
        tensors, columns = packed.tensors, packed.shape[-1]
        mask = unpack_bits(tensors["mask"], 1, columns // BLOCK).bool()
        blocks = torch.zeros(*mask.shape, BLOCK, dtype=torch.int16, device=mask.device)
        blocks[mask] = tensors["fine"].to(torch.int16).flatten(0, -2)
        blocks[~mask] = unpack_bits(tensors["coarse"], 4, BLOCK).flatten(0, -2)
        scales = torch.zeros(mask.shape, dtype=torch.uint8, device=mask.device)
        scales[~mask] = tensors["coarse_scales"].flatten()
        grid = {
            "mask": mask,
            "4.scales": scales.view(torch.float8_e4m3fn),
            "4.tensor_scale": tensors["coarse_tensor_scale"],
            "8.scales": tensors["fine_scale"],
        }
        return blocks.flatten(-2), grid

    def _count(self, shape: tuple[int, ...]) -> int:
        """FP8 blocks of one matrix."""
        return round(self.percent / 100 * shape[-2] * shape[-1] / BLOCK)


def _own(grid: Grid, prefix: str) -> Grid:
    return {n.removeprefix(prefix): t for n, t in grid.items() if n.startswith(prefix)}


def _spread(mask: Tensor, columns: int) -> Tensor:
    return mask.repeat_interleave(columns // mask.shape[-1], -1)
