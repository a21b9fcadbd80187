"""Pairwise interactions: what two changes cost together beyond what each costs alone (CLADO, IMPQ).

    Omega_ij(s, t) = L(i at s, j at t) - L(i at s) - L(j at t) + L(base)

(arXiv 2307.05657, section 3.) L is the measured KL from the unquantized model. Additive scores are
right where all of these vanish. There are many pairs, so they are measured for a chosen set of
units and for schemes where interactions matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.assembly import AssembledModel
from evaluation.restarts import Change, Restarts
from quantization.schemes import Scheme
from sensitivity.base import replaced

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interactions:
    """Pairwise terms among units.

    Args:
        units: their numbers in the layout (n).
        schemes: the schemes that each can have, one list for all (m).
        singles: n x m KL sums of single changes, in nats.
        pairs: n x m x n x m sums of Omega; zero where both are the same unit, symmetric.
        tokens: how many the sums are over.
    """

    units: tuple[int, ...]
    schemes: tuple[str, ...]
    singles: Floats
    pairs: Floats
    tokens: int

    def excess(self) -> Floats:
        """By scheme (m): what pairs at that scheme cost beyond the sum of both, as a share of it."""
        n = len(self.units)
        upper = [(i, j) for i in range(n) for j in range(i + 1, n)]
        found = []
        for s in range(len(self.schemes)):
            alone = sum(self.singles[i, s] + self.singles[j, s] for i, j in upper)
            found.append(sum(self.pairs[i, s, j, s] for i, j in upper) / max(alone, 1e-30))
        return np.array(found)

    def predict(self, choice: Sequence[int | None]) -> float:
        """KL per token of a map that sets unit k to scheme `choice[k]` (None: as in the base)."""
        at = [(k, s) for k, s in enumerate(choice) if s is not None]
        single = sum(self.singles[k, s] for k, s in at)
        pair = sum(self.pairs[k, s, j, t] for k, s in at for j, t in at if k < j)
        return float(single + pair) / self.tokens


def measure_interactions(
    model: AssembledModel,
    chunks: NDArray[np.int64],
    units: Sequence[int],
    schemes: Sequence[Scheme],
) -> Interactions:
    """Measure all pairs of some units inside the blocks, from the unquantized model.

    The first of a pair to be run is set, and all later ones restart from its states: n m passes,
    each with up to n m branches.
    """
    restarts = Restarts(model, chunks)
    blocks = restarts.blocks
    block_of = {u: i for i, inside in enumerate(blocks.units) for u in inside}
    if outside := [u for u in units if u not in block_of]:
        raise ValueError(f"units {outside} are outside the decoder blocks")
    order = sorted(units, key=lambda u: (block_of[u], u))
    n, m = len(order), len(schemes)
    total = len(model.bank.layout.units)
    singles, both = np.zeros((n, m)), np.zeros((n, m, n, m))
    passes = restarts.passes
    for k, u in enumerate(order):
        for s, scheme in enumerate(schemes):
            base = replaced(None, total, u, scheme)
            passes.schemes = base
            passes.rewind(block_of[u])
            passes.forward()
            singles[k, s] = restarts.loss()
            for block in range(block_of[u], len(blocks)):
                later = [j for j in range(k + 1, n) if block_of[order[j]] == block]
                changed = [(j, t) for j in later for t in range(m)]
                changes = [_change(model, base, order[j], schemes[t]) for j, t in changed]
                for (j, t), loss in zip(
                    changed, restarts.losses(block, changes, base), strict=True
                ):
                    both[k, s, j, t] = both[j, t, k, s] = loss
        passes.schemes = None
        passes.rewind(block_of[u])
        passes.forward()
    alone = singles[:, :, None, None] + singles[None, None]
    pairs = both - alone
    pairs[np.arange(n), :, np.arange(n), :] = 0.0
    names = tuple(scheme.name for scheme in schemes)
    return Interactions(tuple(order), names, singles, pairs, restarts.tokens)


def _change(
    model: AssembledModel, base: Sequence[Scheme | None], unit: int, scheme: Scheme
) -> Change:
    schemes = replaced(base, len(base), unit, scheme)
    return lambda: model.load([unit], schemes, dense=True)
