"""Context-marginal: what a scheme costs a unit in the company of a random map (MixQuant).

    score = mean over contexts c of  KL(p || c with the unit at the scheme) - KL(p || c without it)

(arXiv 2607.23047: a module's distortion depends on what is quantized upstream of it.) A context is
a map drawn at random from the menu, another one for every chunk: the blocks before the unit's and
the rest of its own are quantized like that, the blocks after it are not. (Embedding and head, where
the menu opens them, have the whole map for company.)
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from evaluation.assembly import AssembledModel
from evaluation.restarts import Restarts
from quantization.schemes import Scheme
from sensitivity.base import RawTable, Share, empty_table, lossy, menu, replaced
from sensitivity.by_restarts import ByRestarts, losses, places


class ContextMarginal(ByRestarts):
    """KL added by single changes on top of random quantized upstream blocks."""

    name = "context-marginal"
    unit = "nats per token, above a random map's"
    online = True
    most_chunks = 3

    def score(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        choices: Sequence[Sequence[Scheme]],
        share: Share,
    ) -> RawTable:
        """See `Estimator.score`."""
        table, columns = empty_table(choices), menu(choices)
        context = random_context(choices, seed=share.chunks[0])
        restarts = Restarts(model, chunks[slice(*share.chunks)], context)
        table.tokens[slice(*share.units)] = restarts.tokens
        for block, here in places(restarts, range(*share.units)):
            changed: list[tuple[int, Scheme | None]] = [
                (u, scheme)
                for u in here
                if lossy(choices[u])
                for scheme in (None, *lossy(choices[u]))
            ]
            changes = [
                partial(
                    model.load, [u], dense=True, schemes=replaced(context, len(choices), u, scheme)
                )
                for u, scheme in changed
            ]
            found = losses(restarts, block, changes)
            without = {u: loss for (u, s), loss in zip(changed, found, strict=True) if s is None}
            for (u, scheme), loss in zip(changed, found, strict=True):
                if scheme is not None:
                    table.sums[u, columns.index(scheme)] += loss - without[u]
        return table


def random_context(choices: Sequence[Sequence[Scheme]], seed: int) -> list[Scheme | None]:
    """A random map."""
    generator = np.random.default_rng(seed)
    return [row[int(generator.integers(len(row)))] for row in choices]
