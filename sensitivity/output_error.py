"""Output error: how far a layer's output moves, from the second moment of its inputs.

    score = E || x dW^T ||^2 = tr( dW H dW^T ),   H = E[ x^T x ]

One forward pass gives H, and every scheme is then a product with H instead of another pass (the
Hessian of GPTQ, arXiv 2210.17323, up to a factor of two). Blind to what the rest of the model
makes of the output, so comparable within a layer rather than between layers.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.assembly import AssembledModel
from evaluation.calibration import SecondMoments
from evaluation.tap import Tap
from quantization.errors import MeasurementError
from quantization.schemes import Scheme
from quantization.units import Unit
from sensitivity.base import (
    Estimator,
    RawTable,
    Share,
    add_scores,
    empty_table,
    site_error,
    split,
)

TASKS = 4  # a task holds the second moments of its own units only


class OutputError(Estimator):
    """Squared output error of each unit. Template for an estimator."""

    name = "output-error"
    unit = "squared output error per token"

    def shares(self, units: int, chunks: int) -> list[Share]:
        """All chunks for a range of units: H must be whole before it is multiplied."""
        return [Share(part, (0, chunks)) for part in split(units, TASKS)]

    def score(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        choices: Sequence[Sequence[Scheme]],
        share: Share,
    ) -> RawTable:
        """See `Estimator.score`."""
        table = empty_table(choices)
        part = range(*share.units)
        units = model.bank.layout.units
        # a head's product is only seen in a full pass, which the vocabulary makes dear
        opened = any(units[u].layer is None and len(choices[u]) > 1 for u in part)
        forward = model.module if opened else model.module.base_model
        moments = SecondMoments()
        model.assign(None)
        with torch.inference_mode():
            with Tap(model.module, [site for u in part for site in units[u].stored], moments.add):
                for ids in chunks[slice(*share.chunks)]:
                    forward(input_ids=torch.from_numpy(ids)[None].to(model.device), use_cache=False)
            counts = torch.from_numpy(np.bincount(chunks[slice(*share.chunks)].ravel()))
            for u in part:
                table.tokens[u] = chunks[slice(*share.chunks)].size
                if len(choices[u]) > 1:
                    add_scores(table, u, choices, partial(_error, moments, model, units[u], counts))
        return table


def _error(
    moments: SecondMoments, model: AssembledModel, unit: Unit, counts: Tensor, scheme: Scheme
) -> float:
    """tr(dW H dW^T) summed over a unit's sites and experts; lookups by their counts.

    Raises:
        MeasurementError: no product with the unit was seen, so nothing is known of it.
    """
    total, seen = 0.0, False
    for site in unit.stored:
        error = site_error(model.bank, unit, scheme, site).to(model.device)
        error = error.mT if site.transposed else error
        if unit.kind == "embedding":
            rows = error[: len(counts)].square().sum(-1)
            total += float(torch.dot(rows.double(), counts.to(rows.device, torch.float64)))
            seen = True
        experts = error if error.dim() == 3 else error[None]
        for expert, dw in enumerate(experts):
            moment = moments.sums.get((site.name, expert))
            if moment is not None:  # an expert that no token reached has none
                total += float(torch.sum((dw @ moment) * dw, dtype=torch.float64))
                seen = True
    if not seen:
        raise MeasurementError(
            f"the estimator output-error saw no product with {unit.name}; "
            "leave it out of the job's estimators"
        )
    return total
