"""Weight error: the squared error of the weights alone, which knows nothing of text or loss.

The control that other estimators have to beat; it reads no text.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.assembly import AssembledModel
from quantization.schemes import Scheme
from sensitivity.base import Estimator, RawTable, Share, empty_table, lossy, menu, squared_error
from sensitivity.work import Work


class WeightError(Estimator):
    """||dW||^2 of each unit."""

    name = "weight-error"
    unit = "squared weight error"

    def shares(self, units: int, chunks: int) -> list[Share]:
        """One task."""
        return [Share((0, units), (0, chunks))]

    def forecast_bytes(self, choices: Sequence[Sequence[Scheme]], share: Share, work: Work) -> int:
        """See `Estimator.forecast_bytes`."""
        return max(unit.numel for unit in work.layout.units) * (2 * work.itemsize + 8)

    def score(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        choices: Sequence[Sequence[Scheme]],
        share: Share,
    ) -> RawTable:
        """See `Estimator.score`."""
        table, columns = empty_table(choices), menu(choices)
        table.tokens[slice(*share.units)] = 1
        for u in (u for u in range(*share.units) if lossy(choices[u])):
            model.load([u])
            for scheme in lossy(choices[u]):
                table.sums[u, columns.index(scheme)] = squared_error(model, u, scheme)
            if model.bank.layout.units[u].layer is not None:  # embedding and head stay for others
                model.unload([u])
        return table
