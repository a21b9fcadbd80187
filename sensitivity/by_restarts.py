"""What estimators share that measure changes of single units by passes that restart at them."""

from collections.abc import Iterator, Sequence

from evaluation.passes import Schemes
from evaluation.restarts import Change, Restarts
from quantization.schemes import Scheme
from sensitivity.base import Estimator, Share, menu, split
from sensitivity.work import Work

UNITS_A_TASK = 24


class ByRestarts(Estimator):
    """Ranges of units, chunk by chunk, on the first chunks of the text.

    Attributes:
        most_chunks: how many, since a change costs half a pass for each.
    """

    most_chunks = 1

    def shares(self, units: int, chunks: int) -> list[Share]:
        """See `Estimator.shares`."""
        ranges = split(units, -(-units // UNITS_A_TASK))
        return [Share(r, (c, c + 1)) for c in range(min(chunks, self.most_chunks)) for r in ranges]

    def forecast_bytes(self, choices: Sequence[Sequence[Scheme]], share: Share, work: Work) -> int:
        """See `Estimator.forecast_bytes`: the base's states, and a branch a change of a block."""
        branches = (1 + len(menu(choices))) * work.most_units
        states = (2 * work.blocks + 2 * branches) * work.states_bytes
        block = 2 * work.largest_block * work.itemsize
        return work.outer_bytes + states + block + work.activations_bytes + 3 * work.logits_bytes


def places(restarts: Restarts, units: range) -> Iterator[tuple[int | None, list[int]]]:
    """The outer units (None) and each block with those of its units that are in a range."""
    for block, inside in [(None, restarts.blocks.outer), *enumerate(restarts.blocks.units)]:
        if here := [u for u in inside if u in units]:
            yield block, here


def losses(
    restarts: Restarts,
    block: int | None,
    changes: Sequence[Change],
    downstream: Schemes | None = None,
) -> list[float]:
    """KL sums of the base with each of the changes at a place."""
    if block is None:
        return restarts.outer_losses(changes)
    return restarts.losses(block, changes, downstream)
