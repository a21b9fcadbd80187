"""Diagonal Fisher: the second-order KL of a perturbation, correlations between weights ignored.

    score = 1/2 sum_i F_ii dW_i^2,   F_ii = E[ (d log p(y) / d w_i)^2 ],   y sampled from the model

At the unquantized model KL(p || q) has zero gradient and the Fisher matrix as its Hessian, so with
all of F the score would be the loss itself to second order. Labels must be the model's own samples:
then the scores of different tokens are uncorrelated, and the square of a whole chunk's gradient
is an unbiased sum over its tokens; with the text's labels it is neither.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.assembly import AssembledModel
from evaluation.calibration import backward_of_samples
from quantization.schemes import Scheme
from sensitivity.base import (
    Estimator,
    RawTable,
    Share,
    add_scores,
    empty_table,
    split,
)

CHUNKS_A_TASK = 2
BLOCK = 2**16  # elements at a time: temporaries stay in cache; whole ones tore the heap to 4 GB


class DiagonalFisher(Estimator):
    """Diagonal Fisher times squared error; one backward pass a chunk for all schemes."""

    name = "fisher"
    unit = "nats per token, to second order, diagonal"

    def shares(self, units: int, chunks: int) -> list[Share]:
        """All units for a range of chunks: a backward pass reaches them all."""
        return [Share((0, units), part) for part in split(chunks, chunks // CHUNKS_A_TASK)]

    def score(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        choices: Sequence[Sequence[Scheme]],
        share: Share,
    ) -> RawTable:
        """See `Estimator.score`."""
        table = empty_table(choices)
        model.assign(None)
        handles = []
        for u in range(*share.units):
            if all(scheme.weight == "bf16" for scheme in choices[u]):
                continue  # nothing to lose: spare its gradient
            for s, site in enumerate(model.bank.layout.units[u].stored):
                parameter = model.parameter(site.parameter).requires_grad_(True)
                add = partial(_contract, table, u, s, model, choices)
                handles.append((parameter, parameter.register_post_accumulate_grad_hook(add)))
        try:
            for index in range(*share.chunks):
                backward_of_samples(model.module, chunks[index], seed=index)
        finally:
            for parameter, handle in handles:
                handle.remove()
                parameter.requires_grad_(False)
        table.tokens[slice(*share.units)] = chunks[slice(*share.chunks)].size
        return table


def _contract(
    table: RawTable,
    u: int,
    s: int,
    model: AssembledModel,
    choices: Sequence[Sequence[Scheme]],
    parameter: Tensor,
) -> None:
    """Turn one parameter's gradient into scores at once, and free it."""
    assert parameter.grad is not None
    unit, bank = model.bank.layout.units[u], model.bank
    name = unit.stored[s].parameter
    gradient, parameter.grad = parameter.grad.flatten(), None
    reference = bank.reference(unit)[name].flatten()
    shipped = {scheme: bank.borrow(unit, scheme, name).flatten() for scheme in choices[u]}
    scores = dict.fromkeys(choices[u], 0.0)
    for start in range(0, len(gradient), BLOCK):
        part = slice(start, start + BLOCK)
        fisher = gradient[part].float().square_()
        exact = reference[part].to(fisher)
        for scheme, values in shipped.items():
            error = values[part].to(fisher) - exact
            scores[scheme] += 0.5 * float(torch.dot(fisher, error.square_()))
    add_scores(table, u, choices, scores.__getitem__)
