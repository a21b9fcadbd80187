"""The contract of a search strategy: it asks for maps on chunks of text, and is told what they lose.

Strategies never see a model, a worker or a database. A driver asks as often as it has workers, tells
answers in any order, and may stop at any time; `best` is what the strategy would take then.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from search.problem import Choice, Floats, Limits, Problem


@dataclass(frozen=True)
class Question:
    """A map to be measured on a chunk.

    Args:
        choice: the map (U).
        chunk: the chunk's number.
        slopes: whether its slopes are wanted, too; that takes about four times as long.
    """

    choice: Choice
    chunk: int
    slopes: bool = False


@dataclass(frozen=True)
class Setting:
    """What a strategy searches.

    Args:
        problem: tables; the loss is an estimator's, raw or in nats: only its proportions count.
        resource: that the budgets are of.
        starts: for each budget, maps within it, the best known one first.
        chunks: how many chunks of text there are.
        seed: of everything random.
        others: limits on other resources, the same for all budgets.
    """

    problem: Problem
    resource: str
    starts: Mapping[int, Sequence[Choice]]
    chunks: int
    seed: int = 0
    others: Limits = field(default_factory=dict)

    def fits(self, choice: Choice, limit: int) -> bool:
        """Whether a map is within a budget and all other limits."""
        return self.problem.breaks(choice, {self.resource: limit, **self.others}) is None


class Strategy(ABC):
    """Searches better maps at several budgets at once.

    Attributes:
        log: one entry a decision: its `limit`, the measured `difference` to what was best before
            (nats per token) with its standard `error`, `chunks` that it rests on, the `loss` before,
            how many units `changes` has, and whether it is `better`.
    """

    log: list[dict[str, float]]

    @abstractmethod
    def ask(self) -> Question | None:
        """What to measure next; None while answers are awaited, or when there is nothing more."""

    @abstractmethod
    def tell(self, question: Question, loss: float, slopes: Floats | None = None) -> None:
        """An answer: nats per token, and slopes where they were asked for.

        Args:
            question: as it was asked.
            loss: of the map on the chunk, nats per token.
            slopes: U x S, the loss's gradient at the map by each unit's weights, times the error of
                each scheme; nats per token; NaN isn't offered.
        """

    @abstractmethod
    def best(self, limit: int) -> Choice:
        """The best map at a budget."""


@dataclass
class Record:
    """What is known of a map: its losses by chunk, and which chunks were asked for."""

    choice: Choice
    losses: dict[int, float] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)

    def missing(self, chunks: Sequence[int], *, slopes: bool = False) -> Question | None:
        """The question for the first of the chunks that was never asked."""
        for chunk in chunks:
            if chunk not in self.asked:
                self.asked.add(chunk)
                return Question(self.choice, chunk, slopes)
        return None

    def knows(self, chunks: Sequence[int]) -> bool:
        """Whether all of the chunks are answered."""
        return all(chunk in self.losses for chunk in chunks)

    def mean(self, chunks: Sequence[int]) -> float:
        """Mean loss on some chunks."""
        return float(np.mean([self.losses[chunk] for chunk in chunks]))


class Records(dict[bytes, Record]):
    """Records by the content of their maps."""

    def of(self, choice: Choice) -> Record:
        """The record of a map, a new one if need be."""
        choice = choice.astype(np.intp)
        return self.setdefault(choice.tobytes(), Record(choice))


def compared(
    limit: int, before: Record, after: Record, chunks: Sequence[int], *, better: bool
) -> dict[str, float]:
    """An entry of the log: two maps on the same chunks."""
    found = np.array([after.losses[c] - before.losses[c] for c in chunks])
    error = float(found.std(ddof=1) / np.sqrt(len(found))) if len(found) > 1 else float("nan")
    return {
        "limit": limit, "difference": float(found.mean()), "error": error, "chunks": len(chunks),
        "loss": before.mean(chunks), "changes": float((before.choice != after.choice).sum()),
        "better": float(better),
    }  # fmt: skip
