"""One-at-a-time KL: each unit put into each scheme while all others stay as they are (AMQ, ZeroQ).

    score = KL(p || base with the unit changed) - KL(p || base)

Measured, not modelled, so right about single flips at any size; blind to how they add up. Two
bases: the unquantized model, and a quantized one (each unit in the middle of its schemes), where a
flip meets the company that it will have in a map.

In bfloat16 a flip to 6 or 8 bits can be below the arithmetic's noise (`bitfront` reports it).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from evaluation.assembly import AssembledModel
from evaluation.restarts import Restarts
from quantization.schemes import Scheme
from sensitivity.base import RawTable, Share, empty_table, lossy, menu, middle, replaced
from sensitivity.by_restarts import ByRestarts, losses, places


class Flips(ByRestarts):
    """KL of single changes.

    Args:
        quantized: whether the base is quantized.
    """

    unit = "nats per token, one change at a time"
    online = True

    def __init__(self, *, quantized: bool) -> None:
        self.name = "flips-quantized" if quantized else "flips"
        self.quantized = quantized

    def score(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        choices: Sequence[Sequence[Scheme]],
        share: Share,
    ) -> RawTable:
        """See `Estimator.score`."""
        table, columns = empty_table(choices), menu(choices)
        base = [
            middle(unit, row) for unit, row in zip(model.bank.layout.units, choices, strict=True)
        ]
        restarts = Restarts(model, chunks[slice(*share.chunks)], base if self.quantized else None)
        table.tokens[slice(*share.units)] = restarts.tokens
        level = restarts.loss() if self.quantized else 0.0
        # of the base's own loss each open unit carries an equal part, so that sums are right
        part = level / max(1, sum(len(row) > 1 for row in choices))
        for block, here in places(restarts, range(*share.units)):
            changed = [
                (u, scheme)
                for u in here
                if len(choices[u]) > 1
                for scheme in (choices[u] if self.quantized else lossy(choices[u]))
            ]
            schemes = restarts.passes.schemes
            changes = [
                partial(
                    model.load, [u], dense=True, schemes=replaced(schemes, len(choices), u, scheme)
                )
                for u, scheme in changed
            ]
            found = losses(restarts, block, changes, schemes)
            for (u, scheme), loss in zip(changed, found, strict=True):
                table.sums[u, columns.index(scheme)] += loss - level + part
        return table
