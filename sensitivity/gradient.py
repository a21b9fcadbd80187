"""ModelOpt's gradient score: squared output errors, weighed by the loss's squared gradients.

    score = 1/2 sum over tokens and outputs of (dL/dY)^2 (dY)^2,    dY = x dW^T

(NVIDIA Model-Optimizer's auto_quantize, with the loss of the text's labels; the half makes it a
second-order term.) One backward pass serves all schemes: inputs and gradients of a block are held,
and every scheme is a product with them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.assembly import AssembledModel
from evaluation.passes import Passes, text_labels
from evaluation.tap import Tap
from quantization.schemes import Scheme
from quantization.units import Site
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
    unknown_outside_blocks,
)
from sensitivity.work import Work

CHUNKS_A_TASK = 4
Seen = dict[tuple[str, int], list[tuple[Tensor, Tensor]]]
"""Inputs and gradients by the outputs, for each chunk, by site and expert."""


class Gradient(Estimator):
    """Squared gradients by outputs times squared output errors."""

    name = "gradient"
    unit = "squared loss per token, outputs apart"

    def shares(self, units: int, chunks: int) -> list[Share]:
        """All units for a range of chunks: a backward pass reaches them all."""
        return by_chunks(units, chunks, CHUNKS_A_TASK)

    def forecast_bytes(self, choices: Sequence[Sequence[Scheme]], share: Share, work: Work) -> int:
        """See `Estimator.forecast_bytes`."""
        chunks = share.chunks[1] - share.chunks[0]
        states = (work.blocks + 2) * chunks * work.states_bytes
        block = work.largest_block * work.itemsize + work.errors_bytes
        return (
            work.outer_bytes + states + block + work.graphs_bytes(chunks)
            + (1 + chunks) * work.activations_bytes + 4 * work.logits_bytes
        )  # fmt: skip

    def score(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        choices: Sequence[Sequence[Scheme]],
        share: Share,
    ) -> RawTable:
        """See `Estimator.score`; of embedding and head it knows nothing."""
        table = empty_table(choices)
        unknown_outside_blocks(table, model.bank.layout.units, choices)
        own = chunks[slice(*share.chunks)]
        table.tokens[slice(*share.units)] = own.size
        passes = Passes(model, own, share.chunks[0])
        units = model.bank.layout.units
        wanted = [
            [u for u in inside if u in range(*share.units) and lossy(choices[u])]
            for inside in passes.blocks.units
        ]
        bank = model.bank
        work = Work(bank.layout, own.shape[1], bank.dtype.itemsize, roomy=not bank.packed)
        noted: dict[int, list[list[tuple[Site, int, Tensor]]]] = {}

        @contextmanager
        def watch(index: int) -> Iterator[list[Tensor]]:
            places: list[tuple[Site, int, Tensor]] = []
            targets: list[Tensor] = []

            def visit(site: Site, expert: int, inputs: Tensor, outputs: Tensor) -> None:
                places.append((site, expert, inputs.detach()))
                targets.append(outputs)

            sites = [site for u in wanted[index] for site in units[u].stored]
            with Tap(model.module, sites, visit):
                yield targets
            noted.setdefault(index, []).append(places)  # in the order of the chunks

        passes.forward(watch=watch if work.keeps_graphs(len(own)) else None)
        seen: Seen = {}
        stop = next((i for i, inside in enumerate(wanted) if inside), len(wanted))
        for index, c, [found] in passes.backward(text_labels, 1, watch, stop):
            for (site, expert, x), gradient in zip(noted[index][c], found, strict=True):
                pair = x.flatten(0, -2), gradient.flatten(0, -2).float().square()
                seen.setdefault((site.name, expert), []).append(pair)
            if c + 1 == len(own):
                for u in wanted[index]:
                    _add(table, model, u, choices, seen, float(own.shape[1] - 1) ** 2)
                seen.clear()
                del noted[index]
        return table


def _add(
    table: RawTable,
    model: AssembledModel,
    u: int,
    choices: Sequence[Sequence[Scheme]],
    seen: Seen,
    factor: float,
) -> None:
    """The scores of a unit; `factor` turns squared gradients of a mean loss into those of a sum."""
    unit, schemes, columns = model.bank.layout.units[u], lossy(choices[u]), menu(choices)
    experts = max(site.shape[0] if len(site.shape) == 3 else 1 for site in unit.stored)
    sums, tokens = np.zeros((len(schemes), experts)), np.zeros(experts)
    for site in unit.stored:
        joined = {
            (name, e): (torch.cat([x for x, _ in pairs]), torch.cat([g for _, g in pairs]))
            for (name, e), pairs in seen.items()
            if name == site.name
        }
        for i, scheme in enumerate(schemes):
            error = site_error(model, unit, scheme, site)
            error = error.mT if site.transposed else error
            for e, dw in enumerate(error if error.dim() == 3 else error[None]):
                if (site.name, e) in joined:
                    x, squares = joined[site.name, e]
                    moved = (x @ dw.to(x.dtype).T).float().square_()
                    sums[i, e] += 0.5 * factor * float(moved.mul_(squares).sum(1).double().sum())
        for e in range(experts):
            tokens[e] += len(joined[site.name, e][0]) if (site.name, e) in joined else 0
    if unit.kind == "experts":
        add_experts(table, u, choices, schemes, sums, tokens / len(unit.stored))
    else:
        table.sums[u, [columns.index(s) for s in schemes]] += sums.sum(axis=1)
