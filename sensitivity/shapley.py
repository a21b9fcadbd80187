"""Progressive Shapley: the model is lowered step by step, and each unit charged for its own step.

    score(u, s) = sum over the steps down to s of the mean over walks of the KL that u's step added

(IMPQ, arXiv 2509.15455: progressive quantization estimation.) A walk starts from the unquantized
model and takes all units, in a random order, to their largest scheme, then all to the next one, and
so on: a step to 3 bits is taken with half of the others at 3 bits already and half still at 4, which
is the company that it has in a map. Marginal contributions add up to the loss of the whole exactly,
so where all units have the same schemes the scores of a uniform map are its own loss. Embedding and head don't walk.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.assembly import AssembledModel
from evaluation.restarts import Restarts
from quantization.schemes import Scheme
from sensitivity.base import (
    RawTable,
    Share,
    by_bytes,
    empty_table,
    lossy,
    menu,
    unknown_outside_blocks,
)
from sensitivity.by_restarts import ByRestarts

MOST_CHUNKS = 2  # a walk each


class ProgressiveShapley(ByRestarts):
    """Marginal contributions along random walks from high precision to low."""

    name = "shapley"
    unit = "nats per token, marginal along random walks"

    def shares(self, units: int, chunks: int) -> list[Share]:
        """A walk a chunk: its steps depend on each other."""
        return [Share((0, units), (c, c + 1)) for c in range(min(chunks, MOST_CHUNKS))]

    def score(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        choices: Sequence[Sequence[Scheme]],
        share: Share,
    ) -> RawTable:
        """See `Estimator.score`."""
        table, columns = empty_table(choices), menu(choices)
        units = model.bank.layout.units
        unknown_outside_blocks(table, units, choices)
        open_ = [u for u in range(*share.units) if lossy(choices[u]) and units[u].layer is not None]
        ladders = {u: by_bytes(units[u], lossy(choices[u])) for u in open_}
        generator = np.random.default_rng(share.chunks[0])
        schemes: list[Scheme | None] = [None] * len(choices)
        restarts = Restarts(model, chunks[slice(*share.chunks)], schemes)
        passes, blocks = restarts.passes, restarts.blocks
        passes.schemes = schemes
        block_of = {u: i for i, inside in enumerate(blocks.units) for u in inside}
        table.tokens[slice(*share.units)] = restarts.tokens
        paid = dict.fromkeys(open_, 0.0)
        before = 0.0
        for step in range(max(map(len, ladders.values()), default=0)):
            for u in generator.permutation([u for u in open_ if step < len(ladders[u])]):
                schemes[u] = ladders[u][step]
                passes.rewind(block_of[u])
                passes.forward()
                after = restarts.loss()
                paid[u] += after - before
                before = after
                table.sums[u, columns.index(ladders[u][step])] += paid[u]
        return table
