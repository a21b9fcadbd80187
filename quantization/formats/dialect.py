"""DialectFP4: each block picks one of 16 FP4 dialects (BlockDialect, arXiv 2501.01144).

    e = floor(log2 max|x|) - 2        x^ = sign x h / 2 x 2^e,   h = dialect[index], 0 … 15

Every element is a sign and a 3-bit index; a block adds a 4-bit dialect and the 5-bit exponent of
its maximum as float16 has it: 4 + 9 / B bits. Levels are in half units. The dialects come in eight
pairs that share their maximum; all but the last have their lower six levels in common.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from quantization.errors import QuantizationError
from quantization.formats.base import Grid, Packed, ScalarFormat
from quantization.packing import pack_bits, packed_bytes, unpack_bits
from quantization.statistics import NOTHING_KNOWN, SiteStatistics

LOWER = (0, 1, 2, 3, 4, 6)
UPPER = (
    (11, 15), (9, 15), (11, 14), (9, 14), (10, 13), (8, 13), (10, 12), (8, 12),
    (9, 11), (7, 11), (9, 10), (7, 10), (8, 9), (7, 9), (7, 8),
)  # fmt: skip
DIALECTS = torch.tensor([[*LOWER, *upper] for upper in UPPER] + [[0, 1, 2, 3, 4, 5, 6, 8]]).float()
MIDDLES = (DIALECTS[:, 1:] + DIALECTS[:, :-1]) / 2
BINS = 32
_CENTRES = (torch.arange(BINS) + 0.5) / 2
NEAREST = DIALECTS.T[(_CENTRES[:, None, None] - DIALECTS).abs().argmin(-1), torch.arange(16)]
BIAS = 15  # float16's
BLOCKS_A_STEP = 2**16  # bounds the temporaries


@dataclass(frozen=True)
class DialectFP4(ScalarFormat):
    """Blocks of `block` columns.

    Args:
        two_stage: choose the dialect as the paper's activation path does, by the maximum and a
            count of elements, instead of by the least squared error.
    """

    block: int
    two_stage: bool = False

    family = "dialect"
    rowwise = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """`dialectfp4-b32`; `-online` with the two-stage choice."""
        return f"dialectfp4-b{self.block}{'-online' if self.two_stage else ''}"

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Blocks are whole."""
        if shape[-1] % self.block:
            return f"{shape[-1]} columns don't divide into blocks of {self.block}"
        return None

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Half a byte an element, nine bits a block, each stream padded to a byte a row."""
        *leading, columns = shape
        blocks = columns // self.block
        rows = packed_bytes(columns, 4) + packed_bytes(blocks, 4) + packed_bytes(blocks, 5)
        return prod(leading) * rows

    def fit(self, weight: Tensor, statistics: SiteStatistics = NOTHING_KNOWN) -> Grid:
        """Exponents and dialects, `... x rows x blocks`."""
        blocks = weight.unflatten(-1, (-1, self.block))
        _, exponents = torch.frexp(blocks.abs().amax(-1))
        exponents = exponents.to(torch.int32) - 1
        if exponents.numel() and exponents.max().item() > 31 - BIAS:
            raise QuantizationError(
                f"a block reaches 2^{exponents.max().item()}, above DialectFP4's 2^{32 - BIAS}; "
                "keep this layer in bf16"
            )
        exponents = exponents.clamp(min=-BIAS)
        choose = _by_counts if self.two_stage else _by_error
        flat, scales = blocks.flatten(0, -2), exponents.flatten()
        dialects = [
            choose(_half_units(flat[i : i + BLOCKS_A_STEP], scales[i : i + BLOCKS_A_STEP, None]))
            for i in range(0, len(flat), BLOCKS_A_STEP)
        ]
        return {
            "dialects": torch.cat(dialects).view(exponents.shape).to(torch.int16),
            "exponents": (exponents + BIAS).to(torch.int16),
        }

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """Bit patterns (int16): the sign above a 3-bit index."""
        blocks = _blocks(weight, grid)
        h = _half_units(blocks, grid["exponents"].int()[..., None] - BIAS)
        middles = MIDDLES.to(weight.device)[grid["dialects"].int()]
        codes = torch.zeros_like(h, dtype=torch.int16)
        for k in range(7):
            codes += h > middles[..., k, None]
        return (codes + 8 * (blocks < 0)).to(torch.int16).flatten(-2)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Sign x level / 2 x 2^e in float32."""
        blocks = _blocks(codes, grid)
        places = grid["dialects"].int()[..., None] * 8 + (blocks & 7)
        levels = DIALECTS.to(codes.device).flatten().index_select(0, places.flatten().int())
        signs = 1 - 2 * (blocks >> 3)
        exponents = grid["exponents"].int()[..., None] - BIAS - 3  # -2 and the half unit
        return torch.ldexp(levels.view(blocks.shape) * signs, exponents).flatten(-2)

    def take(self, grid: Grid, columns: Tensor, width: int) -> Grid:
        """See `ScalarFormat.take`: blocks of one column."""
        blocks = columns // (width // grid["dialects"].shape[-1])
        return {name: tensor.index_select(-1, blocks) for name, tensor in grid.items()}

    def pack(self, codes: Tensor, grid: Grid) -> Packed:
        """Three bit streams a row."""
        tensors = {
            "codes": pack_bits(codes, 4),
            "dialects": pack_bits(grid["dialects"], 4),
            "exponents": pack_bits(grid["exponents"], 5),
        }
        return Packed(self.name, tuple(codes.shape), tensors)

    def unpack(self, packed: Packed) -> tuple[Tensor, Grid]:
        """Undo `pack`."""
        columns = packed.shape[-1]
        blocks = columns // self.block
        grid = {
            "dialects": unpack_bits(packed.tensors["dialects"], 4, blocks),
            "exponents": unpack_bits(packed.tensors["exponents"], 5, blocks),
        }
        return unpack_bits(packed.tensors["codes"], 4, columns), grid


def _blocks(matrix: Tensor, grid: Grid) -> Tensor:
    return matrix.unflatten(-1, (grid["dialects"].shape[-1], -1))


def _half_units(blocks: Tensor, exponents: Tensor) -> Tensor:
    """Magnitudes in half units: the maximum of a block lies in [8, 16)."""
    return torch.ldexp(blocks.abs(), 3 - exponents)


def _by_error(h: Tensor) -> Tensor:
    """The dialect of least squared error for each block (blocks x size).

    Every middle between levels is a multiple of half a half unit, so floor(2 h) says which level of
    any dialect is nearest, n, and a block's error is sum h^2 + sum_bins (count n^2 - 2 n sum h):
    one pass over the elements serves all sixteen.
    """
    bins = (h * 2).floor_().clamp_(max=BINS - 1).long()
    nothing = h.new_zeros(len(h), BINS)
    counts = nothing.scatter_add(-1, bins, torch.ones_like(h))
    sums = nothing.scatter_add(-1, bins, h)
    nearest = NEAREST.to(h.device)
    return (counts @ nearest.square() - 2 * (sums @ nearest)).argmin(-1)


def _by_counts(h: Tensor) -> Tensor:
    """Section 3.2's two stages: a pair by the block's maximum, one of it by beneficial ranges.

    In a pair with second values a > b and maximum M, elements in [(a + b) / 2, (a + M) / 2) gain
    from the first dialect, those in [(p + b) / 2, (a + b) / 2) from the second, p the level below;
    the last pair differs in 7 against 5 instead. Magnitudes have two fraction bits.
    """
    h = (h * 2).floor_() / 2
    pairs = (15 - h.amax(-1).floor().clamp(8, 15)).long()
    ranges = [
        ((p + b) / 2, (a + b) / 2, (a + b) / 2, (a + m) / 2)
        for (a, m), (b, _), p in zip(UPPER[0:14:2], UPPER[1:14:2], [6] * 7, strict=True)
    ]
    ranges.append((4.5, 5.5, 6.5, 7.5))
    edges = torch.tensor(ranges, device=h.device)[pairs]
    low_b, high_b, low_a, high_a = (edge[:, None] for edge in edges.unbind(-1))
    first = ((h >= low_a) & (h < high_a)).sum(-1)
    second = ((h >= low_b) & (h < high_b)).sum(-1)
    return 2 * pairs + (first <= second)
