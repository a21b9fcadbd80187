"""Scores of KV caches in a backward pass: gradients by keys and values, and what a format makes of them.

Where a weight's error is the same for every text, a cache's is that of the keys and values which the
text has made: it is contracted chunk by chunk, a row of one head of one token standing for a row of a
weight.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from evaluation.assembly import AssembledModel
from evaluation.caches import Written, quantized
from quantization.schemes import Scheme
from quantization.units import Slot, cache_slot
from sensitivity.base import RawTable, lossy, menu


class Contracts(Protocol):
    """What an estimator from gradients makes of errors (see `WeightGradient`)."""

    def contract(self, errors_SRC: Tensor, gradients_PRC: Tensor) -> Tensor:
        """S x P numbers."""

    def total(self, contracted_SP: Tensor) -> Tensor:
        """S scores."""


class Pasts:
    """The caches among some units, by the block that writes them.

    Args:
        model: the replica.
        units: numbers in the layout; those of weights are left out.
    """

    def __init__(self, model: AssembledModel, units: Sequence[int]) -> None:
        self._model = model
        self._slots: dict[int, list[tuple[int, Slot]]] = {}
        for u in units:
            unit = model.bank.layout.units[u]
            for slot in map(cache_slot, unit.sites) if unit.kind == "cache" else ():
                self._slots.setdefault(slot[0], []).append((u, slot))
        self._exact: dict[int, list[list[Tensor]]] = {}

    def units(self, block: int) -> list[int]:
        """The caches that a block writes, once for each slot."""
        return [u for u, _ in self._slots.get(block, ())]

    @contextmanager
    def watch(self, block: int) -> Iterator[Callable[[], list[Tensor]]]:
        """Around a block's run; gives what it wrote, complete at the end, to differentiate by."""
        wanted = self._slots.get(block, ())
        if not wanted:
            yield list
            return
        assert self._model.caches
        written: dict[Slot, list[Written]] = {slot: [] for _, slot in wanted}
        with self._model.caches.watch(written):
            yield lambda: [written[slot][-1].kept for _, slot in wanted]
        runs = self._exact.setdefault(block, [])  # in the order of the chunks
        runs.append([written[slot][-1].exact for _, slot in wanted])

    def score(
        self,
        estimator: Contracts,
        table: RawTable,
        choices: Sequence[Sequence[Scheme]],
        block: int,
        chunk: int,
        found: list[tuple[Tensor, ...]],
    ) -> None:
        """Add a block's scores on a chunk; takes its gradients off the end of each pass's."""
        wanted = self._slots.get(block, ())
        if not wanted:
            return
        columns = menu(choices)
        own = [passed[-len(wanted) :] for passed in found]
        found[:] = [passed[: -len(wanted)] for passed in found]
        exacts, self._exact[block][chunk] = self._exact[block][chunk], []
        for i, ((u, _), exact) in enumerate(zip(wanted, exacts, strict=True)):
            schemes = lossy(choices[u])
            gradients_PRC = torch.stack([_rows(passed[i]) for passed in own])
            errors_SRC = torch.stack(
                [_rows(quantized(exact, s.weight)) - _rows(exact) for s in schemes]
            )
            scores = estimator.total(estimator.contract(errors_SRC, gradients_PRC).double())
            at = [columns.index(scheme) for scheme in schemes]
            table.sums[u, at] += scores.cpu().numpy()


def _rows(states: Tensor) -> Tensor:
    """1 x heads x tokens x width as rows x width, in float32."""
    return states.reshape(-1, states.shape[-1]).float()
