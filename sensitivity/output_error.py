"""Output error: how far a layer's output moves, from the second moment of its inputs.

    score = E || x dW^T ||^2 = tr( dW H dW^T ),   H = E[ x^T x ]

One forward pass gives H, and every scheme is then a product with H instead of another pass (the
Hessian of GPTQ, arXiv 2210.17323, up to a factor of two). Blind to what the rest of the model
makes of the output, so comparable within a layer rather than between layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.assembly import AssembledModel
from evaluation.calibration import SecondMoments
from evaluation.passes import Passes
from evaluation.tap import Tap
from quantization.errors import MeasurementError
from quantization.schemes import Scheme
from quantization.units import Site, Unit
from sensitivity.base import (
    Estimator,
    RawTable,
    Share,
    add_experts,
    by_chunks,
    empty_table,
    lossy,
    menu,
    site_error,
)
from sensitivity.work import Work

CHUNKS_A_TASK = 8


class OutputError(Estimator):
    """Squared output error of each unit. Template for an estimator."""

    name = "output-error"
    unit = "squared output error per token"

    def shares(self, units: int, chunks: int) -> list[Share]:
        """All units for a range of chunks: each pass goes through all blocks."""
        return by_chunks(units, chunks, CHUNKS_A_TASK)

    def forecast_bytes(self, choices: Sequence[Sequence[Scheme]], share: Share, work: Work) -> int:
        """See `Estimator.forecast_bytes`: a block, its second moments, two rounds of states."""
        opened = 3 * work.opened_bytes(choices)
        states = 2 * (share.chunks[1] - share.chunks[0]) * work.states_bytes
        block = work.largest_block * work.itemsize + work.moments_bytes
        return (
            work.outer_bytes + opened + states + block + work.activations_bytes + work.errors_bytes
        )

    def score(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        choices: Sequence[Sequence[Scheme]],
        share: Share,
    ) -> RawTable:
        """See `Estimator.score`."""
        table = empty_table(choices)
        own = chunks[slice(*share.chunks)]
        table.tokens[slice(*share.units)] = own.size
        units = model.bank.layout.units
        wanted = [u for u in range(*share.units) if lossy(choices[u])]
        passes = Passes(model, own, share.chunks[0])

        @contextmanager
        def around(index: int) -> Iterator[None]:
            here = [u for u in passes.blocks.units[index] if u in wanted]
            moments = SecondMoments()
            with Tap(model.module, [s for u in here for s in units[u].stored], moments.add):
                yield
            for u in here:
                _add(table, model, u, choices, moments)

        last = max((i for i, u in enumerate(passes.blocks.units) if {*u} & {*wanted}), default=-1)
        outer = [u for u in passes.blocks.outer if u in wanted]
        passes.forward(around, len(passes.blocks) - 1 if outer else last, keep=False)
        for u in outer:
            _add_outer(table, model, u, choices, passes)
        return table


def _add(
    table: RawTable,
    model: AssembledModel,
    u: int,
    choices: Sequence[Sequence[Scheme]],
    moments: SecondMoments,
) -> None:
    """tr(dW H dW^T) of a unit's sites, expert by expert where it has some."""
    unit, schemes = model.bank.layout.units[u], lossy(choices[u])
    if not any(
        (site.name, e) in moments.sums for site in unit.stored for e in range(_experts(site))
    ):
        raise MeasurementError(
            f"the estimator output-error saw no product with {unit.name}; "
            "leave it out of the job's estimators"
        )
    sums = np.zeros((len(schemes), max(_experts(site) for site in unit.stored)))
    for site in unit.stored:
        for i, scheme in enumerate(schemes):
            error = _error(model, unit, scheme, site)
            for e, dw in enumerate(error if error.dim() == 3 else error[None]):
                moment = moments.sums.get((site.name, e))
                if moment is not None:  # an expert that no token reached has none
                    sums[i, e] += float(torch.sum((dw @ moment) * dw, dtype=torch.float64))
    columns = menu(choices)
    if unit.kind == "experts":
        first = unit.stored[0]
        seen = [float(moments.tokens.get((first.name, e), 0)) for e in range(_experts(first))]
        add_experts(table, u, choices, schemes, sums, np.array(seen))
    else:
        table.sums[u, [columns.index(s) for s in schemes]] += sums.sum(axis=1)


def _add_outer(
    table: RawTable,
    model: AssembledModel,
    u: int,
    choices: Sequence[Sequence[Scheme]],
    passes: Passes,
) -> None:
    """Embedding and head: lookups by their counts, products by the final hidden states."""
    unit, schemes = model.bank.layout.units[u], lossy(choices[u])
    ids = torch.cat([ids[0] for ids in passes.ids])
    counts = torch.bincount(ids).double()
    head = model.module.get_output_embeddings().weight
    moment = None
    if any(model.parameter(site.parameter) is head for site in unit.stored):
        with torch.no_grad():
            final = [
                passes.blocks.finish(i, h).float()
                for i, h in zip(passes.ids, passes.states[-1], strict=True)
            ]
        moment = sum(h.T @ h for h in final)
    columns = menu(choices)
    for scheme in schemes:
        dw = _error(model, unit, scheme, unit.stored[0])
        total = 0.0
        if unit.kind == "embedding":
            total += float(torch.dot(dw[: len(counts)].square().sum(-1).double(), counts))
        if moment is not None:
            total += float(torch.sum((dw @ moment) * dw, dtype=torch.float64))
        table.sums[u, columns.index(scheme)] += total


def _error(model: AssembledModel, unit: Unit, scheme: Scheme, site: Site) -> Tensor:
    error = site_error(model, unit, scheme, site)
    return error.mT if site.transposed else error


def _experts(site: Site) -> int:
    return site.shape[0] if len(site.shape) == 3 else 1
