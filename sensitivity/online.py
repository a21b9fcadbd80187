"""Scores of what is quantized while a model runs: gradients by it, and what a format makes of it.

Where a weight's error is the same for every text, that of keys, values and activations is of what the
text has made: it is contracted chunk by chunk, a row of a token standing for a row of a weight. A
scheme of weights with activations costs the sum of both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from evaluation import activations, caches
from evaluation.assembly import AssembledModel
from evaluation.online import Written
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Slot, cache_slot
from sensitivity.base import RawTable, lossy, menu

Choices = Sequence[Sequence[Scheme]]


class Contracts(Protocol):
    """What an estimator from gradients makes of errors (see `WeightGradient`)."""

    def contract(self, errors_SRC: Tensor, gradients_PRC: Tensor) -> Tensor:
        """S x P numbers."""

    def total(self, contracted_SP: Tensor) -> Tensor:
        """S scores."""


class Place(NamedTuple):
    """A tensor of a unit: what a slot of its cache is given, or what one of its layers reads."""

    unit: int
    key: Slot | str


class Online:
    """What a model quantizes as it runs, of some units, by block.

    Args:
        model: the replica.
        choices: the schemes of each unit of the layout.
        units: numbers in the layout; those that only store weights are left out.
    """

    def __init__(self, model: AssembledModel, choices: Choices, units: Sequence[int]) -> None:
        self._model, self._choices = model, choices
        self._places: dict[int, list[Place]] = {}
        for u in units:
            unit = model.bank.layout.units[u]
            if unit.kind == "cache":
                for slot in map(cache_slot, unit.sites):
                    self._places.setdefault(slot[0], []).append(Place(u, slot))
            elif _formats(choices[u]) and unit.layer is not None:
                model.read_inputs()
                inside = self._places.setdefault(unit.layer, [])
                inside += [Place(u, site.name) for site in unit.sites]
        self._exact: dict[int, list[list[Tensor]]] = {}

    def units(self, block: int) -> list[int]:
        """Those that have something in a block."""
        return [place.unit for place in self._places.get(block, ())]

    @contextmanager
    def watch(self, block: int) -> Iterator[Callable[[], list[Tensor]]]:
        """Around a block's run; gives what to differentiate by, complete at the end."""
        places = self._places.get(block, ())
        if not places:
            yield list
            return
        seen: dict[Slot | str, list[Written]] = {place.key: [] for place in places}
        with ExitStack() as stack:
            if self._model.caches:
                slots = {key: own for key, own in seen.items() if not isinstance(key, str)}
                stack.enter_context(self._model.caches.watch(slots))
            if self._model.activations:
                paths = {key: own for key, own in seen.items() if isinstance(key, str)}
                stack.enter_context(self._model.activations.watch(paths))
            yield lambda: [seen[place.key][-1].kept for place in places]
        runs = self._exact.setdefault(block, [])  # in the order of the chunks
        runs.append([seen[place.key][-1].exact for place in places])

    def score(
        self,
        estimator: Contracts,
        table: RawTable,
        block: int,
        chunk: int,
        found: list[tuple[Tensor, ...]],
    ) -> None:
        """Add a block's scores on a chunk; takes its gradients off the end of each pass's."""
        places = self._places.get(block, ())
        if not places:
            return
        own = [passed[-len(places) :] for passed in found]
        found[:] = [passed[: -len(places)] for passed in found]
        exacts, self._exact[block][chunk] = self._exact[block][chunk], []
        read: dict[int, tuple[Tensor, list[Tensor]]] = {}
        for i, (place, exact) in enumerate(zip(places, exacts, strict=True)):
            gradients = [_rows(passed[i]) for passed in own]
            if not isinstance(place.key, str):
                self._add(estimator, table, place.unit, exact, gradients)
            elif place.unit in read:  # the layers of a unit read one tensor
                for total, more in zip(read[place.unit][1], gradients, strict=True):
                    total += more
            else:
                read[place.unit] = exact, [gradient.clone() for gradient in gradients]
        for u, (exact, gradients) in read.items():
            self._add(estimator, table, u, exact, gradients)

    def _add(
        self,
        estimator: Contracts,
        table: RawTable,
        u: int,
        exact: Tensor,
        gradients: Sequence[Tensor],
    ) -> None:
        is_cache = self._model.bank.layout.units[u].kind == "cache"
        schemes = lossy(self._choices[u])
        formats = list(dict.fromkeys(s.weight for s in schemes)) if is_cache else _formats(schemes)
        quantized = caches.quantized if is_cache else activations.quantized
        errors_SRC = torch.stack([_rows(quantized(exact, f)) - _rows(exact) for f in formats])
        contracted_SP = estimator.contract(errors_SRC, torch.stack(list(gradients)))
        scores = dict(zip(formats, estimator.total(contracted_SP.double()).tolist(), strict=True))
        columns = menu(self._choices)
        for scheme in schemes:
            format = scheme.weight if is_cache else scheme.activation
            table.sums[u, columns.index(scheme)] += scores.get(format, 0.0)


def _formats(schemes: Sequence[Scheme]) -> list[str]:
    """Those of activations."""
    return list(dict.fromkeys(s.activation for s in schemes if s.activation != FULL_PRECISION))


def _rows(states: Tensor) -> Tensor:
    """... x width as rows x width, in float32."""
    return states.reshape(-1, states.shape[-1]).float()
