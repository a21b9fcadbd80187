"""Measured maps: Fisher scores, corrected by the measured KL of whole random maps.

    log KL_n = a + b log sum_u e^(theta_u) score(u, map_n(u))

Single changes, however exactly they are measured, don't say how changes add up; whole maps do, and
each of them tells something of all units at once. Random ones of the menu's lower half of sizes,
where losses don't add up, are measured, each on one chunk, and one factor a unit is fitted to them,
drawn towards 1 (`corrected`).
What additive scores miss at low bits (saturation, company) goes into the factors.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.assembly import AssembledModel
from evaluation.restarts import Restarts
from quantization.formats import FORMATS
from quantization.schemes import Scheme
from quantization.units import Unit
from sensitivity.base import Floats, RawTable, Share, menu
from sensitivity.by_restarts import ByRestarts
from sensitivity.correction import MeasuredMap
from sensitivity.fisher import DiagonalFisher
from sensitivity.work import Work

MAPS_A_CHUNK = 24
MOST_CHUNKS = 8
PRIOR = DiagonalFisher(quantized=True)


class MeasuredMaps(ByRestarts):
    """Fisher scores at a quantized base with a factor for each unit."""

    name = "measured-maps"
    unit = "nats per token, to second order, corrected by measured maps"
    online = True

    def shares(self, units: int, chunks: int) -> list[Share]:
        """All units, chunk by chunk: every map says something of all units."""
        return [Share((0, units), (c, c + 1)) for c in range(min(chunks, MOST_CHUNKS))]

    def forecast_bytes(self, choices: Sequence[Sequence[Scheme]], share: Share, work: Work) -> int:
        """See `Estimator.forecast_bytes`."""
        passes = super().forecast_bytes(choices, share, work)
        return max(passes, PRIOR.forecast_bytes(choices, share, work))

    def score(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        choices: Sequence[Sequence[Scheme]],
        share: Share,
    ) -> RawTable:
        """See `Estimator.score`."""
        prior = PRIOR.score(model, chunks, choices, share)
        columns = menu(choices)
        bits = _bits(model.bank.layout.units, columns)
        restarts = Restarts(model, chunks[slice(*share.chunks)])
        generator = np.random.default_rng(share.chunks[0])
        maps = []
        for _ in range(MAPS_A_CHUNK):
            drawn = _random_map(choices, columns, bits, generator)
            choice = tuple(columns.index(scheme) for scheme in drawn)
            kl = restarts.loss_of(drawn) / restarts.tokens
            maps.append(MeasuredMap(choice, kl, share.chunks[0]))
        return RawTable(prior.sums, prior.tokens, prior.experts, tuple(maps))


def _bits(units: Sequence[Unit], columns: Sequence[Scheme]) -> Floats:
    """Effective bits of each scheme for each unit."""
    return np.array(
        [
            [
                8
                * sum(FORMATS[scheme.weight].nbytes(s.shape) for s in unit.matrices)
                / sum(s.numel for s in unit.matrices)
                for scheme in columns
            ]
            for unit in units
        ]
    )


def _random_map(
    choices: Sequence[Sequence[Scheme]],
    columns: Sequence[Scheme],
    bits: Floats,
    generator: np.random.Generator,
) -> list[Scheme]:
    """A map around some number of bits, with more or less spread about it."""
    open_ = [u for u, row in enumerate(choices) if len(row) > 1]
    offered = np.array([[scheme in row for scheme in columns] for row in choices])
    inside = bits[open_][offered[open_]] if open_ else bits
    target = generator.uniform(inside.min(), np.median(inside))
    spread = generator.uniform(0.3, 2.0)
    drawn = []
    for u, row in enumerate(choices):
        own = np.array([bits[u, columns.index(scheme)] for scheme in row])
        weights = np.exp(-np.abs(own - target) / spread)
        drawn.append(row[int(generator.choice(len(row), p=weights / weights.sum()))])
    return drawn
