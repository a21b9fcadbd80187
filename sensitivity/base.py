"""The contract of a sensitivity estimator: calibration chunks in, a raw table out.

What an estimator sees of a scheme is the error of the quantizer that ships: the difference
between the bank's tensors and the reference. Sums are additive over chunks and independent between
units, so that tasks over ranges of both can run on any worker and be merged.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evaluation.assembly import AssembledModel
from quantization.bank import Bank
from quantization.schemes import Scheme
from quantization.units import Site, Unit

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """One task's part of the work: half-open ranges of units and of calibration chunks."""

    units: tuple[int, int]
    chunks: tuple[int, int]


@dataclass(frozen=True)
class RawTable:
    """Sums of a raw score over calibration tokens.

    Args:
        sums: units x schemes of the menu; NaN where a scheme isn't offered to a unit.
        tokens: per unit, how many tokens were summed over.
    """

    sums: Floats
    tokens: Floats

    def mean(self) -> Floats:
        """Units x schemes, per token."""
        return self.sums / self.tokens[:, None]


class Estimator(ABC):
    """Predicts how much loss each unit suffers under each scheme.

    Estimators are stateless; during a call they own the model, and they leave the reference
    assigned. `unit` names what a mean score measures; `search` turns it into nats per token.
    """

    name: str
    unit: str

    @abstractmethod
    def shares(self, units: int, chunks: int) -> list[Share]:
        """How to cut the work. Depends on nothing else, so that any pool has the same tasks."""

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


def menu(choices: Sequence[Sequence[Scheme]]) -> list[Scheme]:
    """The columns of every table: each scheme once, in order of first appearance."""
    return list(dict.fromkeys(scheme for schemes in choices for scheme in schemes))


def empty_table(choices: Sequence[Sequence[Scheme]]) -> RawTable:
    """Zeros where a scheme is offered, NaN elsewhere."""
    schemes = menu(choices)
    sums = [[0.0 if s in offered else np.nan for s in schemes] for offered in choices]
    return RawTable(np.array(sums), np.zeros(len(choices)))


def merge(tables: Iterable[RawTable]) -> RawTable:
    """Add up the tables of all shares, in the order given."""
    first, *others = tables
    sums, tokens = first.sums.copy(), first.tokens.copy()
    for table in others:
        sums += table.sums
        tokens += table.tokens
    return RawTable(sums, tokens)


def add_scores(
    table: RawTable,
    unit: int,
    choices: Sequence[Sequence[Scheme]],
    score: Callable[[Scheme], float],
) -> None:
    """Add `score(scheme)` to the unit's row for every scheme that it is offered."""
    schemes = menu(choices)
    for scheme in choices[unit]:
        table.sums[unit, schemes.index(scheme)] += score(scheme)


def site_error(bank: Bank, unit: Unit, scheme: Scheme, site: Site) -> Tensor:
    """DW of a site in float32, as the model stores it: what ships less the reference."""
    shipped = bank.borrow(unit, scheme, site.parameter).float()
    return shipped - bank.reference(unit)[site.parameter].float()
