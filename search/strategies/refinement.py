"""Refinement: measure a map, correct the table around it, solve again, keep what measures better.

For each budget there is an incumbent. Its slopes and all that was measured so far make a posterior
of the loss table around it; the solver's optimum under the posterior's mean, or under a table drawn
from it (Thompson), within so many changes of the incumbent, is the next candidate. Candidate and
incumbent meet on the same chunks of text, one after the other: a candidate that is worse with
confidence is dropped, one that is better takes over, and either way the difference corrects the
table. Where nothing better is found the comparison is widened to more chunks, so that small
differences are told from noise. Slopes of all maps serve all budgets, discounted by their distance.

With one question at a time it is deterministic.
"""

from dataclasses import dataclass, field

import numpy as np

from search.errors import SearchError
from search.exact import solve
from search.posterior import Difference, Posterior, Slopes
from search.problem import Choice, Floats, Problem
from search.strategies.base import Question, Record, Setting, Strategy, compared

WIDTH = 4  # chunks of a comparison, at first
TRUST = 12  # changes of a candidate, at first
LEAST_TRUST, MORE_TRUST, LESS_TRUST = 3, 1.5, 0.7
CONFIDENCE = 1.0, 2.0  # standard errors to drop a candidate, and to accept one early
ACCEPT_AFTER = 4  # chunks
PATIENCE = 3  # failures until a comparison is widened
ROUGH = 0.02  # standard deviation of differences, of the loss, until there are three chunks
TRIES, GAP, SECONDS = 12, 1e-3, 5.0
WAITING = 0.002  # what a budget's turn gains by every question that others get
CHANGES = "changes"


@dataclass
class _Sloped(Record):
    """A map with the sums of its slopes and of their squares over chunks."""

    slopes: Floats | None = None
    squares: Floats | None = None

    @property
    def loss(self) -> float:
        """Mean over all chunks that it was measured on."""
        return float(np.mean(list(self.losses.values())))

    def add(self, chunk: int, loss: float, slopes: Floats) -> None:
        """One more chunk."""
        self.losses[chunk] = loss
        self.slopes = slopes + (0.0 if self.slopes is None else self.slopes)
        self.squares = slopes**2 + (0.0 if self.squares is None else self.squares)


@dataclass
class _Descent:
    """The search at one budget."""

    limit: int
    order: list[int]
    incumbent: bytes
    queue: list[bytes]
    candidate: bytes | None = None
    width: int = WIDTH
    trust: float = TRUST
    failures: int = 0
    proposals: int = 0
    merit: float = 1.0
    tried: set[bytes] = field(default_factory=set)
    done: bool = False


class Refinement(Strategy):
    """Descends at several budgets at once."""

    def __init__(self, setting: Setting) -> None:
        problem = setting.problem
        self._setting, self._problem = setting, problem
        self._generator = np.random.default_rng(setting.seed)
        self._rows = np.arange(len(problem.loss))
        self._prior = np.where(problem.offered, problem.loss, 0.0).clip(min=0)
        self._records: dict[bytes, _Sloped] = {}
        self._differences: list[tuple[Difference, float]] = []
        self._descents = []
        self.log = []
        for limit, maps in setting.starts.items():
            first, *queue = [self._record(choice) for choice in maps]
            order = self._generator.permutation(setting.chunks).tolist()
            width = min(WIDTH, setting.chunks)
            self._descents.append(_Descent(limit, order, first, queue, width=width))

    def ask(self) -> Question | None:
        """See `Strategy.ask`: the budget that promises most, and has waited."""
        order = sorted(self._descents, key=lambda d: -d.merit)
        for descent in order:
            found = None if descent.done else self._wanted(descent)
            if found:
                for other in self._descents:
                    other.merit += 0 if other is descent else WAITING
                return found
        return None

    def tell(self, question: Question, loss: float, slopes: Floats | None = None) -> None:
        """See `Strategy.tell`; it wants slopes."""
        record = self._records[self._record(question.choice)]
        assert slopes is not None
        record.add(question.chunk, loss, np.nan_to_num(slopes))
        for descent in self._descents:
            if descent.candidate is not None:
                self._judge(descent)

    def best(self, limit: int) -> Choice:
        """The incumbent at a budget."""
        [descent] = [d for d in self._descents if d.limit == limit]
        return self._records[descent.incumbent].choice

    def _record(self, choice: Choice) -> bytes:
        choice = choice.astype(np.intp)
        key = choice.tobytes()
        self._records.setdefault(key, _Sloped(choice))
        return key

    def _wanted(self, descent: _Descent) -> Question | None:
        chunks = descent.order[: descent.width]
        incumbent = self._records[descent.incumbent]
        if question := incumbent.missing(chunks, slopes=True):
            return question
        if descent.candidate is None:
            if not incumbent.knows(chunks):
                return None  # awaited
            self._challenge(descent)
        if descent.candidate is None:
            return None
        return self._records[descent.candidate].missing(chunks, slopes=True)

    def _challenge(self, descent: _Descent) -> None:
        """Find a candidate for a measured incumbent, widening where there is none."""
        if descent.queue:
            descent.candidate = descent.queue.pop(0)
        elif (found := self._propose(descent)) is not None:
            descent.candidate = self._record(found)
            descent.tried.add(descent.candidate)
        else:
            self._failed(descent, widen=True)
            return
        self._judge(descent)  # another budget may have measured it

    def _propose(self, descent: _Descent) -> Choice | None:
        incumbent = self._records[descent.incumbent]
        posterior = self.posterior(descent.incumbent)
        for attempt in range(TRIES):
            thompson = attempt or descent.proposals % 2
            scale = 0.5 * (1 + attempt / 2)
            table = posterior.draw(self._generator, scale) if thompson else posterior.table()
            descent.proposals += 1
            choice = self._solve(descent, incumbent.choice, table)
            key = choice.tobytes() if choice is not None else descent.incumbent
            if key != descent.incumbent and key not in descent.tried:
                return choice
        return None

    def _solve(self, descent: _Descent, at: Choice, table: Floats) -> Choice | None:
        problem = self._problem
        changes = np.ones(problem.loss.shape, dtype=np.int64)
        changes[self._rows, at] = 0
        local = Problem(
            table - table[self._rows, at][:, None],
            {**problem.costs, CHANGES: changes}, problem.offered, problem.few, problem.names,
        )  # fmt: skip
        limits = {
            **self._setting.others,
            self._setting.resource: descent.limit,
            CHANGES: int(descent.trust),
        }
        try:
            return solve(local, limits, GAP, SECONDS).choice.astype(np.intp)
        except SearchError:
            return None

    def posterior(self, key: bytes) -> Posterior:
        """Of the table around a measured map."""
        record = self._records[key]
        loss = record.loss
        total = float(self._prior[self._rows, record.choice].sum())
        prior = self._prior * (loss / max(total, 1e-300))
        posterior = Posterior(prior, record.choice, loss, self._noise())
        for other in self._records.values():
            if other.slopes is not None:
                count = len(other.losses)
                posterior.slopes(Slopes(other.choice, other.slopes / count, other.loss, count))
        for seen, level in self._differences:
            ratio = loss / max(level, 1e-12)
            if 0.5 < ratio < 2:
                posterior.difference(
                    Difference(
                        seen.before, seen.after, seen.value * ratio, seen.variance * ratio**2
                    )
                )
        return posterior

    def _noise(self) -> float:
        """Variance of slopes between chunks, of their squared curvature term: pooled over maps."""
        spread = curvature = 0.0
        for record in self._records.values():
            count = len(record.losses)
            if count < 2 or record.slopes is None or record.squares is None:
                continue
            own = self._prior[self._rows, record.choice]
            scale = record.loss / max(float(own.sum()), 1e-300)
            mean = record.slopes / count
            spread += float((record.squares - count * mean**2).sum())
            curvature += (count - 1) * float((((self._prior + own[:, None]) * scale) ** 2).sum())
        return spread / curvature if curvature else 1.0

    def _judge(self, descent: _Descent) -> None:
        """Decide on the candidate, if what is measured suffices."""
        assert descent.candidate is not None
        challenger, incumbent = self._records[descent.candidate], self._records[descent.incumbent]
        chunks = [
            c
            for c in descent.order[: descent.width]
            if c in challenger.losses and c in incumbent.losses
        ]
        if not chunks:
            return
        found = np.array([challenger.losses[c] - incumbent.losses[c] for c in chunks])
        mean, count = float(found.mean()), len(found)
        rough = ROUGH * incumbent.loss
        spread = max(float(found.std(ddof=1)), rough / 2) if count > 2 else rough
        error = spread / np.sqrt(count)
        whole = count == descent.width
        better = mean < 0 and (
            whole or (count >= ACCEPT_AFTER and mean + CONFIDENCE[1] * error < 0)
        )
        worse = mean - CONFIDENCE[0] * error > 0 or (whole and not better)
        if not (better or worse):
            return
        difference = Difference(incumbent.choice, challenger.choice, mean, error**2)
        self._differences.append((difference, incumbent.loss))
        entry = compared(descent.limit, incumbent, challenger, chunks, better=better)
        self.log.append({**entry, "error": error})
        gain = max(0.0, -mean) / max(incumbent.loss, 1e-12) if better else 0.0
        descent.merit = 0.5 * descent.merit + 0.5 * gain
        if better:
            descent.incumbent, descent.failures = descent.candidate, 0
            descent.trust = min(descent.trust * MORE_TRUST, len(self._rows))
            descent.tried.clear()
        else:
            self._failed(descent)
        descent.candidate = None

    def _failed(self, descent: _Descent, *, widen: bool = False) -> None:
        descent.trust = max(LEAST_TRUST, descent.trust * LESS_TRUST)
        descent.failures += 1
        if not (widen or descent.failures >= PATIENCE):
            return
        if descent.width == self._setting.chunks and widen:
            descent.done = True
        descent.width = min(2 * descent.width, self._setting.chunks)
        descent.failures = 0
