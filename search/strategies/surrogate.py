"""Surrogate-assisted NSGA-II: breed thousands of maps on a model of the loss, measure the best few.

(AMQ, arXiv 2509.12019, algorithm 1.) An archive of measured maps; radial basis functions over their
schemes correct the estimator's table; NSGA-II minimises the corrected loss and the cost; from its
front a few maps near each budget are measured and join the archive.

    log loss(x) ~ log sum_u prior_u,x(u) + rbf(x)
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from search.controls import random_walk
from search.problem import Choice, Floats
from search.strategies.base import Question, Record, Records, Setting, Strategy, compared

WIDTH = 4  # chunks that a map is measured on
FIRST, BATCH = 8, 2  # maps a budget: to begin with around its start, and in every round
SWITCHES = 8  # exchanges, at most, of the first ones
POPULATION, GENERATIONS = 100, 20
CROSSOVER, MUTATED = 0.9, 2.0  # probability; genes a child, on average
SMOOTHING = 1e-2

Choices = NDArray[np.intp]
"""Many maps (N x U)."""

Predict = Callable[[Choices], Floats]
"""From maps to predicted log losses (N)."""


class Surrogate(Strategy):
    """Measures what a surrogate of the loss finds best."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._records = setting, Records()
        self._generator = np.random.default_rng(setting.seed)
        self._chunks = list(range(min(WIDTH, setting.chunks)))
        offered = setting.problem.offered
        self._prior = np.where(offered, setting.problem.loss, 0.0).clip(min=1e-12)
        self._menus = [np.flatnonzero(row) for row in offered]
        self._best = {limit: self._records.of(maps[0]) for limit, maps in setting.starts.items()}
        self.log = []
        self._wanted = [self._records.of(c) for maps in setting.starts.values() for c in maps]
        for limit, record in self._best.items():
            for _ in range(FIRST):
                switches = int(self._generator.integers(1, SWITCHES + 1))
                self._want(self._walk(record.choice, switches), limit)

    def ask(self) -> Question | None:
        """See `Strategy.ask`: a new round once all maps of the last one are answered."""
        for _ in range(2):
            for record in self._wanted:
                if question := record.missing(self._chunks):
                    return question
            if not all(record.knows(self._chunks) for record in self._wanted):
                return None
            self._wanted = []
            self._breed()
        return None

    def tell(self, question: Question, loss: float, slopes: Floats | None = None) -> None:
        """See `Strategy.tell`."""
        record = self._records.of(question.choice)
        record.losses[question.chunk] = loss
        if not record.knows(self._chunks):
            return
        known = [r for r in self._records.values() if r.knows(self._chunks)]
        for limit, best in self._best.items():
            if not best.knows(self._chunks):
                continue  # a start; it is compared with all others when it arrives
            for other in known if record is best else [record]:
                if other is not best and self._setting.fits(other.choice, limit):
                    self._compare(limit, other)

    def best(self, limit: int) -> Choice:
        """The measured map within the budget that loses least."""
        return self._best[limit].choice

    def _compare(self, limit: int, record: Record) -> None:
        best = self._best[limit]
        better = record.mean(self._chunks) < best.mean(self._chunks)
        self.log.append(compared(limit, best, record, self._chunks, better=better))
        if better:
            self._best[limit] = record

    def _walk(self, choice: Choice, switches: int) -> Choice:
        problem, resource = self._setting.problem, self._setting.resource
        return random_walk(problem, resource, choice, switches, self._generator)

    def _want(self, choice: Choice, limit: int) -> bool:
        record = self._records.of(choice)
        if record.asked or not self._setting.fits(choice, limit):
            return False
        self._wanted.append(record)
        return True

    def _breed(self) -> None:
        """The maps of the next round."""
        archive = [record for record in self._records.values() if record.knows(self._chunks)]
        measured = np.array([record.choice for record in archive])
        logs = np.log([max(record.mean(self._chunks), 1e-9) for record in archive])
        predict = self._surrogate(measured, logs)
        population = self._evolve(measured, predict)
        losses, costs = predict(population), self._costs(population)
        for limit in self._best:
            order = [i for i in np.argsort(losses, kind="stable") if costs[i] <= limit]
            wanted = 0
            for i in order:
                wanted += self._want(population[i], limit)
                if wanted == BATCH:
                    break

    def _surrogate(self, measured: Choices, logs: Floats) -> Predict:
        """Fitted to measured maps and the logarithms of their losses."""
        from scipy.interpolate import RBFInterpolator

        units = np.arange(measured.shape[1])

        def base(choices: Choices) -> Floats:
            return np.asarray(np.log(self._prior[units, choices].sum(axis=1)))

        def features(choices: Choices) -> Floats:
            # square roots of what a unit loses: maps that differ where it matters are far apart
            roots: Floats = np.sqrt(self._prior[units, choices])
            return roots

        fitted = RBFInterpolator(
            features(measured), logs - base(measured), kernel="linear", smoothing=SMOOTHING
        )

        def predict(choices: Choices) -> Floats:
            return np.asarray(base(choices) + fitted(features(choices)), dtype=np.float64)

        return predict

    def _costs(self, choices: Choices) -> Floats:
        table = self._setting.problem.costs[self._setting.resource]
        return np.asarray(table[np.arange(choices.shape[1]), choices].sum(axis=1), dtype=float)

    def _evolve(self, archive: Choices, predict: Predict) -> Choices:
        """NSGA-II on the surrogate; the last population."""
        generator = self._generator
        more = archive[generator.integers(len(archive), size=max(0, POPULATION - len(archive)))]
        population = np.concatenate([archive, self._mutated(more)])
        for _ in range(GENERATIONS):
            pairs = generator.integers(len(population), size=(2, POPULATION))
            crossed = generator.random((POPULATION, 1)) < CROSSOVER
            swap = crossed & (generator.random((POPULATION, population.shape[1])) < 0.5)
            children = np.where(swap, population[pairs[1]], population[pairs[0]])
            population = np.unique(np.concatenate([population, self._mutated(children)]), axis=0)
            objectives = np.column_stack([predict(population), self._costs(population)])
            population = population[best_of(objectives, POPULATION)]
        return population

    def _mutated(self, choices: Choices) -> Choices:
        generator, result = self._generator, choices.copy()
        rate = MUTATED / max(choices.shape[1], 1)
        for n, u in np.argwhere(generator.random(choices.shape) < rate):
            result[n, u] = generator.choice(self._menus[u])
        return result


def best_of(objectives: Floats, count: int) -> Choice:
    """The `count` best of N points (N x 2, less is better) by rank, then by crowding distance.

    (NSGA-II, Deb et al. 2002.)
    """
    left = np.arange(len(objectives))
    chosen: list[int] = []
    while len(left) and len(chosen) < count:
        points = objectives[left]
        order = np.lexsort((points[:, 1], points[:, 0]))
        sorted_ = points[order, 1]
        before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_)[:-1]])
        front = order[sorted_ < before]
        spread = _crowding(points[front])
        chosen += left[front[np.argsort(-spread, kind="stable")]].tolist()
        left = np.delete(left, front)
    return np.array(chosen[:count], dtype=np.intp)


def _crowding(points: Floats) -> Floats:
    """The crowding distance of the points of one front."""
    distance = np.zeros(len(points))
    for column in points.T:
        order = np.argsort(column, kind="stable")
        values, span = column[order], max(float(np.ptp(column)), 1e-300)
        distance[order[1:-1]] += (values[2:] - values[:-2]) / span
        distance[order[[0, -1]]] = np.inf
    return distance
