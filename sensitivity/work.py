"""What passes cost in memory, as far as a layout and a text tell: the parts of a forecast."""

from collections.abc import Sequence
from dataclasses import dataclass

from quantization.schemes import Scheme
from quantization.units import Layout, Unit

KEPT_BYTES = 3 * 10**9
"""The most that one task's graphs may take: a laptop's worker has that much."""


@dataclass(frozen=True)
class Work:
    """The sizes that forecasts are made of.

    Args:
        tokens: of a chunk.
        itemsize: bytes of a number of the arithmetic type.
        roomy: memory holds the model anyhow, so that bounds by a block aren't asked for.
    """

    layout: Layout
    tokens: int
    itemsize: int
    roomy: bool = False

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.layout.units[0].sites[0].shape[-1]

    @property
    def outer_bytes(self) -> int:
        """Embedding and head."""
        return self.itemsize * sum(u.numel for u in self.layout.units if u.layer is None)

    def opened_bytes(self, choices: Sequence[Sequence[Scheme]]) -> int:
        """Embedding and head as far as the menu opens them, in float32."""
        pairs = zip(self.layout.units, choices, strict=True)
        return 4 * sum(u.numel for u, row in pairs if u.layer is None and len(row) > 1)

    @property
    def logits_bytes(self) -> int:
        """One chunk's logits in float32."""
        return 4 * self.tokens * max(u.sites[0].shape[0] for u in self.layout.units)

    @property
    def states_bytes(self) -> int:
        """One chunk's hidden states at one place."""
        return self.tokens * self.width * self.itemsize

    @property
    def blocks(self) -> int:
        """Decoder blocks that hold units."""
        return len({unit.layer for unit in self.layout.units} - {None})

    @property
    def largest_block(self) -> int:
        """Weights of the largest block."""
        return max(sum(unit.numel for unit in units) for units in self._by_block())

    @property
    def largest_site(self) -> int:
        """Weights of the largest site inside the blocks."""
        return max(s.numel for units in self._by_block() for unit in units for s in unit.sites)

    @property
    def errors_bytes(self) -> int:
        """What reading the errors of the largest site takes, with packed codes on their way."""
        return 64 * self.largest_site

    @property
    def most_units(self) -> int:
        """Units of the block that has most."""
        return max(len(units) for units in self._by_block())

    @property
    def moments_bytes(self) -> int:
        """Second moments of the inputs of a block's sites, in float32."""
        return 4 * max(
            sum(s.numel // s.shape[-2] * s.shape[-1] for unit in units for s in unit.sites)
            for units in self._by_block()
        )

    @property
    def activations_bytes(self) -> int:
        """What a block's graph keeps of a chunk: its products' inputs and outputs, twice over."""
        ends = max(
            sum(sum(site.shape[-2:]) for unit in units for site in unit.sites)
            for units in self._by_block()
        )
        return 2 * self.tokens * ends * self.itemsize

    def keeps_graphs(self, chunks: int) -> bool:
        """Whether a pass over some chunks keeps the graphs of all blocks, instead of one at a time.

        Not of mixtures of experts, whose graphs grow with the experts that each token goes to.
        """
        mixture = any(unit.kind == "experts" for unit in self.layout.units)
        return self.roomy and not mixture and self._all_graphs_bytes(chunks) <= KEPT_BYTES

    def graphs_bytes(self, chunks: int) -> int:
        """What graphs take in a backward pass over some chunks."""
        kept = self._all_graphs_bytes(chunks) if self.keeps_graphs(chunks) else 0
        return kept + self.activations_bytes

    def _all_graphs_bytes(self, chunks: int) -> int:
        """Products' inputs and outputs once (an output is often an input), and a tenth for the rest."""
        return int(0.55 * self.activations_bytes) * self.blocks * chunks

    def _by_block(self) -> list[list[Unit]]:
        blocks: dict[int, list[Unit]] = {}
        for unit in self.layout.units:
            if unit.layer is not None:
                blocks.setdefault(unit.layer, []).append(unit)
        return list(blocks.values())
