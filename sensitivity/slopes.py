"""Slopes: the loss's gradient at a quantized map, times the error of each scheme.

    slope(u, s) = < d KL(p || q) / dW_u,  W_us - W_u >

with q the model under a map m. At the unquantized model this gradient is zero and only curvature is
left (`fisher`); at a map it tells how a unit's error meets the errors of all others, for every unit
and scheme from one backward pass. No estimator of the registry: it wants a map, which a search has.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.assembly import AssembledModel
from evaluation.evaluator import Evaluator, Measurement
from evaluation.passes import Passes
from quantization.schemes import Scheme
from sensitivity.base import Floats, Share
from sensitivity.weight_gradients import WeightGradient


@dataclass(frozen=True)
class LocalSlopes:
    """A map's loss on a chunk, and its slopes.

    Args:
        loss: as `Evaluator.measure` gives it.
        sums: units x schemes of the menu, summed over the chunk's predicted tokens, in nats; NaN
            where a scheme isn't offered. Differences within a unit are what a change makes, to
            first order.
    """

    loss: Measurement
    sums: Floats


def measure_slopes(
    evaluator: Evaluator,
    schemes: Sequence[Scheme | None],
    ids: NDArray[np.int64],
    choices: Sequence[Sequence[Scheme]],
) -> LocalSlopes:
    """Loss and slopes of a map on one chunk: about three times a measurement.

    Raises:
        MeasurementError: NaN or infinity in the logits, or a model that can't be cut into blocks.
    """
    start = time.perf_counter()
    gradient = _KLGradient(evaluator, schemes, ids)
    share = Share((0, len(choices)), (0, 1))
    table = gradient.score(evaluator.model, ids[None], choices, share)
    sums = table.sums.copy()
    for unit, experts in table.experts.items():
        sums[unit] += experts.sums.sum(axis=1)
    loss = replace(gradient.loss, seconds=time.perf_counter() - start)
    return LocalSlopes(loss, sums)


class _KLGradient(WeightGradient):
    """Inner products of the KL's gradient at a map with the error of each scheme."""

    name = "slopes"
    unit = "nats, to first order"
    linear = True

    def __init__(
        self, evaluator: Evaluator, schemes: Sequence[Scheme | None], ids: NDArray[np.int64]
    ) -> None:
        self._evaluator, self._ids = evaluator, ids
        # it measures whole maps, too; the memory of a GPU is what `unload` is for
        self.resident = not evaluator.bank.packed and evaluator.model.device.type == "cpu"
        self._p_TH = p_TH = evaluator.reference(ids)

        def by_logits(logits_TV: Tensor, _ids: Tensor, _generator: torch.Generator) -> Tensor:
            """Of KL(p || q) by the logits of q, which is q - p; the last token predicts nothing."""
            p_TV = evaluator.head.logits(p_TH, evaluator.head.weight).float().softmax(-1)
            gradient_TV = logits_TV.softmax(-1).sub_(p_TV)
            gradient_TV[-1] = 0
            return gradient_TV

        self.probe = by_logits
        self._schemes = schemes

    def base(
        self, model: AssembledModel, choices: Sequence[Sequence[Scheme]]
    ) -> Sequence[Scheme | None]:
        """The map."""
        return self._schemes

    def arrived(self, passes: Passes) -> list[list[Tensor]] | None:
        """The map's loss; where the head is linear, its gradient costs little more."""
        last = passes.states[-1][0].detach().requires_grad_()
        with torch.enable_grad():
            q_TH = passes.blocks.finish(passes.ids[0], last)
        self.loss, by_q_TH = self._evaluator.loss_with_gradient(
            self._p_TH, q_TH.detach(), self._ids
        )
        return None if by_q_TH is None else [[*torch.autograd.grad(q_TH, last, by_q_TH)]]

    def contract(self, errors_SRC: Tensor, gradients_PRC: Tensor) -> Tensor:
        """Inner products."""
        return errors_SRC.flatten(1) @ gradients_PRC.flatten(1).T

    def total(self, contracted_SP: Tensor) -> Tensor:
        """A sum: slopes have a sign."""
        return contracted_SP.sum(-1)
