"""Evolution: level switches that keep the budget, and selection on more and more text. Template.

(EvoPress, arXiv 2410.14649, algorithm 1.) One parent a budget. Offspring raise some units a level and
lower others until the cost is what it was; they meet on one chunk, the best few on more, and the
last one replaces its parent if it is better on the chunks of both. Nothing is estimated.
"""

from dataclasses import dataclass, field

import numpy as np

from search.controls import random_walk
from search.problem import Choice, Floats
from search.strategies.base import Question, Record, Records, Setting, Strategy, compared

OFFSPRING = 12
STAGES = ((1, 4), (3, 1), (8, 1))  # chunks that a survivor is measured on, and survivors
SWITCHES = 3  # at most; the smaller of two draws
TRIES = 20  # draws for a new map within all limits
BARREN = 20  # generations in a row without a question, after which there is nothing left to ask


@dataclass
class _Population:
    """One budget's generation."""

    limit: int
    parent: Record
    chunks: list[int] = field(default_factory=list)
    alive: list[Record] = field(default_factory=list)
    stage: int = 0


class Evolution(Strategy):
    """A (1 + lambda) search with budget-preserving mutations."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._generator = np.random.default_rng(setting.seed)
        self._records = Records()
        self._turn = 0
        self.log = []
        self._populations = [
            _Population(limit, self._records.of(maps[0])) for limit, maps in setting.starts.items()
        ]

    def ask(self) -> Question | None:
        """See `Strategy.ask`: budgets in turn, so that none waits for the slowest answer."""
        for _ in self._populations:
            population = self._populations[self._turn % len(self._populations)]
            self._turn += 1
            if question := self._wanted(population):
                return question
        return None

    def tell(self, question: Question, loss: float, slopes: Floats | None = None) -> None:
        """See `Strategy.tell`."""
        self._records.of(question.choice).losses[question.chunk] = loss

    def best(self, limit: int) -> Choice:
        """The parent."""
        [population] = [p for p in self._populations if p.limit == limit]
        return population.parent.choice

    def _wanted(self, population: _Population) -> Question | None:
        if not population.alive:
            self._breed(population)
        bred = 0
        while population.alive and bred < BARREN:
            chunks = self._chunks(population)
            for record in (population.parent, *population.alive):
                if question := record.missing(chunks):
                    return question
            if not all(r.knows(chunks) for r in (population.parent, *population.alive)):
                return None
            self._select(population, chunks)
            if not population.alive:
                self._breed(population)
                bred += 1
        return None  # all that a small model's maps can become is known

    def _chunks(self, population: _Population) -> list[int]:
        return population.chunks[: min(STAGES[population.stage][0], self._setting.chunks)]

    def _select(self, population: _Population, chunks: list[int]) -> None:
        """The survivors of a stage; after the last one the new parent."""
        ranked = sorted(population.alive, key=lambda record: record.mean(chunks))
        population.alive = ranked[: STAGES[population.stage][1]]
        population.stage += 1
        if population.stage < len(STAGES):
            return
        child, parent = population.alive[0], population.parent
        better = child.mean(chunks) < parent.mean(chunks)
        self.log.append(compared(population.limit, parent, child, chunks, better=better))
        population.parent = child if better else parent
        population.alive = []

    def _breed(self, population: _Population) -> None:
        setting, generator = self._setting, self._generator
        population.stage = 0
        population.chunks = generator.permutation(setting.chunks).tolist()
        seen = {population.parent.choice.tobytes()}
        for _ in range(OFFSPRING * TRIES):
            switches = int(generator.integers(1, SWITCHES + 1, 2).min())
            child = random_walk(
                setting.problem, setting.resource, population.parent.choice, switches, generator
            )
            if child.tobytes() not in seen and setting.fits(child, population.limit):
                seen.add(child.tobytes())
                population.alive.append(self._records.of(child))
            if len(population.alive) == OFFSPRING:
                return
