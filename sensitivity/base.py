"""The contract of a sensitivity estimator: calibration chunks in, a raw table out.

What an estimator sees of a scheme is the error of the quantizer that ships: the difference
between the bank's tensors and the reference. Sums are additive over chunks and independent between
units, so that tasks over ranges of both can run on any worker and be merged. (Estimators that draw
maps draw them for each share of their own, so there the cut is part of the result.)
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evaluation.assembly import AssembledModel
from quantization.schemes import Scheme
from quantization.units import Site, Unit
from sensitivity.correction import MeasuredMap, corrected
from sensitivity.work import Work

Floats = NDArray[np.float64]

PRIOR_TOKENS = 32.0
"""How many tokens of its siblings' estimate an expert starts with (`Experts.shrunk`)."""


@dataclass(frozen=True)
class Share:
    """One task's part of the work: half-open ranges of units and of calibration chunks."""

    units: tuple[int, int]
    chunks: tuple[int, int]


@dataclass(frozen=True)
class Experts:
    """What a unit of packed experts suffers, expert by expert.

    Args:
        sums: schemes of the menu x experts; NaN where a scheme isn't offered.
        tokens: how many tokens each expert saw.
    """

    sums: Floats
    tokens: Floats

    def shrunk(self) -> Floats:
        """The unit's sums (schemes), each expert's rate drawn towards that of all.

        An expert's rate s_e / n_e over few tokens is noise; the mean of all, r, is worth k tokens
        of evidence (an empirical Bayes estimate with a prior of fixed weight):

            rate_e = (s_e + k r) / (n_e + k)        sum = (sum_e n_e) sum_e w_e rate_e

        with w_e the expert's share of the traffic, smoothed alike: an expert that no token of this
        text reached will still serve some.
        """
        total, experts = float(self.tokens.sum()), len(self.tokens)
        if not total:
            return self.sums.sum(axis=1)
        mean = self.sums.sum(axis=1, keepdims=True) / total
        rates = (self.sums + PRIOR_TOKENS * mean) / (self.tokens + PRIOR_TOKENS)
        traffic = (self.tokens + 1) / (total + experts)
        return total * (rates * traffic).sum(axis=1)


@dataclass(frozen=True)
class RawTable:
    """Sums of a raw score over calibration tokens.

    Args:
        sums: units x schemes of the menu; NaN where a scheme isn't offered to a unit.
        tokens: per unit, how many tokens were summed over.
        experts: by unit, what `sums` leaves out because it is known expert by expert.
        maps: measured maps that the table is to be corrected by.
    """

    sums: Floats
    tokens: Floats
    experts: dict[int, Experts] = field(default_factory=dict)
    maps: tuple[MeasuredMap, ...] = ()

    def mean(self) -> Floats:
        """Units x schemes, per token; each unit corrected by what the maps say of it."""
        sums = self.sums.copy()
        for unit, experts in self.experts.items():
            sums[unit] += experts.shrunk()
        table = np.asarray(sums / self.tokens[:, None])
        return corrected(table, self.maps) if self.maps else table


class Estimator(ABC):
    """Predicts how much loss each unit suffers under each scheme.

    Estimators are stateless; during a call they own the model, and whoever uses it next assigns
    what it wants. `unit` names what a mean score measures; `search` turns it into nats per token.
    """

    name: str
    unit: str
    online = False
    """Whether it scores what is quantized while a model runs, too: KV caches and activations."""
    revision = 1
    """Raise it when a change of the estimator changes its scores: stored ones are then left."""

    @abstractmethod
    def shares(self, units: int, chunks: int) -> list[Share]:
        """How to cut the work. Depends on nothing else, so that any pool has the same tasks."""

    @abstractmethod
    def forecast_bytes(self, choices: Sequence[Sequence[Scheme]], share: Share, work: Work) -> int:
        """The memory that `score` will need beside the process's own, for any share."""

    @abstractmethod
    def score(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        choices: Sequence[Sequence[Scheme]],
        share: Share,
    ) -> RawTable:
        """Score every choice of the share's units on the share's chunks.

        Args:
            model: the replica; its bank holds reference and quantized tensors.
            chunks: all calibration chunks, chunks x tokens of ids.
            choices: the schemes of each unit of the layout.
            share: the ranges of units and chunks to work on.

        Returns:
            A table over all units; zero sums and tokens outside the share.
        """


def split(length: int, parts: int) -> list[tuple[int, int]]:
    """Cut `range(length)` into at most `parts` nearly equal half-open ranges."""
    parts = max(1, min(parts, length))
    edges = [length * i // parts for i in range(parts + 1)]
    return list(pairwise(edges))


def by_chunks(units: int, chunks: int, most: int) -> list[Share]:
    """All units for ranges of at most `most` chunks."""
    return [Share((0, units), part) for part in split(chunks, -(-chunks // most))]


def menu(choices: Sequence[Sequence[Scheme]]) -> list[Scheme]:
    """The columns of every table: each scheme once, in order of first appearance."""
    return list(dict.fromkeys(scheme for schemes in choices for scheme in schemes))


def lossy(schemes: Sequence[Scheme]) -> list[Scheme]:
    """Those of a unit's schemes that can cost something."""
    return [scheme for scheme in schemes if not scheme.exact]


def empty_table(choices: Sequence[Sequence[Scheme]]) -> RawTable:
    """Zeros where a scheme is offered, NaN elsewhere."""
    schemes = menu(choices)
    sums = [[0.0 if s in offered else np.nan for s in schemes] for offered in choices]
    return RawTable(np.array(sums), np.zeros(len(choices)), {})


def merge(tables: Iterable[RawTable]) -> RawTable:
    """Add up the tables of all shares, in the order given."""
    first, *others = tables
    sums, tokens, experts = first.sums.copy(), first.tokens.copy(), dict(first.experts)
    for table in others:
        sums += table.sums
        tokens += table.tokens
        for unit, own in table.experts.items():
            known = experts.get(unit)
            experts[unit] = (
                Experts(known.sums + own.sums, known.tokens + own.tokens) if known else own
            )
    maps = (*first.maps, *(measured for table in others for measured in table.maps))
    return RawTable(sums, tokens, experts, maps)


def unknown_outside_blocks(
    table: RawTable, units: Sequence[Unit], choices: Sequence[Sequence[Scheme]]
) -> None:
    """Say of embedding and head, where the menu opens them, that an estimator can't score them."""
    columns = menu(choices)
    for u, (unit, row) in enumerate(zip(units, choices, strict=True)):
        if unit.layer is None and len(row) > 1:
            table.sums[u, [columns.index(scheme) for scheme in lossy(row)]] = np.nan


def add_experts(
    table: RawTable,
    unit: int,
    choices: Sequence[Sequence[Scheme]],
    schemes: Sequence[Scheme],
    sums: Floats,
    tokens: Floats,
) -> None:
    """Note what a unit of experts suffers under some schemes (`sums`, schemes x experts)."""
    columns = menu(choices)
    whole = np.array([np.full(len(tokens), 0.0 if s in choices[unit] else np.nan) for s in columns])
    whole[[columns.index(scheme) for scheme in schemes]] = sums
    table.experts[unit] = Experts(whole, tokens)


def site_error(model: AssembledModel, unit: Unit, scheme: Scheme, site: Site) -> Tensor:
    """DW of a site in float32, as the model stores it: what ships less the loaded reference."""
    shipped = model.bank.borrow(unit, scheme, site.parameter).to(model.device)
    return shipped.float() - model.parameter(site.parameter).detach().float()


def by_bytes(unit: Unit, schemes: Sequence[Scheme]) -> list[Scheme]:
    """The schemes from the largest to the smallest."""
    from quantization.formats import FORMATS

    def nbytes(scheme: Scheme) -> int:
        return sum(FORMATS[scheme.weight].nbytes(site.shape) for site in unit.matrices)

    return sorted(schemes, key=nbytes, reverse=True)


def middle(unit: Unit, schemes: Sequence[Scheme]) -> Scheme:
    """Of a unit's schemes the middle one by bytes, the larger of two."""
    choices = by_bytes(unit, lossy(schemes) or schemes)
    return choices[(len(choices) - 1) // 2]


def replaced(
    schemes: Sequence[Scheme | None] | None, units: int, unit: int, scheme: Scheme | None
) -> list[Scheme | None]:
    """The schemes of all units, but for one."""
    changed: list[Scheme | None] = [None] * units if schemes is None else list(schemes)
    changed[unit] = scheme
    return changed


def squared_error(model: AssembledModel, u: int, scheme: Scheme) -> float:
    """||dW||^2 of a unit whose reference is loaded."""
    unit = model.bank.layout.units[u]
    errors = (site_error(model, unit, scheme, site) for site in unit.stored)
    return sum(float(error.square().sum()) for error in errors)
