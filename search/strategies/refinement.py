"""Refinement: take the gradient at the best map, predict the table around it, solve again.

Every budget has an incumbent, whose gradient is measured on one fresh chunk of text after the other.
What all of them tell about errors that meet (`search.fields`) makes a table around each incumbent; the
solver's optimum under it, within so many changes, is the next map. A step that one chunk can judge is
first measured on a chunk that knows the incumbent: prediction and measurement, each by its own error,
decide. Where they agree steps grow, where a step fails it is halved. Where chunks are noisier than
predictions, as at high bits, the step is taken on trust and corrected by the next gradients.

A budget is done when its steps have gained next to nothing for a while. With one question at a time
it is deterministic.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from search.errors import SearchError
from search.exact import solve
from search.fields import Fields, Step
from search.problem import Choice, Floats, Problem
from search.strategies.base import Question, Setting, Strategy

FIRST = 2  # gradients at the start before the first step
TRUST, LEAST = 12, 2  # changes of a step, at first and at least
GOOD, BAD = 0.7, 0.3  # measured gain of the predicted one, to take longer and shorter steps
LONGER, SHORTER = 1.5, 0.5
SURE = 0.5  # errors that a step on trust must be better by: texts differ in style, too
TELLING = 0.7  # a prediction's error, of a measurement's, from which on a chunk judges
SHARES = 1.0, 0.5, 0.25  # of the trusted changes that are compared by prediction
SURPRISING = 2.0  # errors that a failed step was off by, to ask where it went wrong
GRADIENT = 4  # what a gradient costs, in measurements
PROMISE, LITTLE = 0.1, 0.003  # gain that a budget is expected to make next, at first and at least
FORGET = 0.7  # of that, at each step
ENOUGH = 5e-4  # gain expected of another step at which a budget's search ends
FLOOR, TINY = 1e-4, 1e-9  # of a unit's greatest loss; of errors
CONFIDENCE, MOST = 1.0, 4  # errors at which a trial is decided, and chunks until it is anyhow
DRAWS, PATIENCE = 8, 12  # to find an untried map, and failures in a row that end a budget's search
GAP, SECONDS = 1e-3, 5.0
NEIGHBOURLY = 4  # every so many proposals comes from another budget
CHANGES = "changes"


@dataclass
class _Trial:
    """A candidate that meets the incumbent on chunks of text."""

    choice: Choice
    step: Step
    asked: list[int] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)


@dataclass
class _Descent:
    """The search at one budget."""

    limit: int
    incumbent: Choice
    others: list[Choice]
    losses: dict[int, float] = field(default_factory=dict)  # of the incumbent, by chunk
    sloped: set[int] = field(default_factory=set)  # chunks with the incumbent's gradient
    turn: int = 0  # in the order of chunks
    told: int = 0  # gradients
    spent: float = 0.0
    promise: float = PROMISE
    done: bool = False
    fresh: bool = False  # a gradient has been told since the last step
    trust: float = TRUST
    proposals: int = 0
    trial: _Trial | None = None
    lesson: Question | None = None  # the gradient at a candidate that failed
    failures: int = 0
    rejected: set[bytes] = field(default_factory=set)
    history: list[Choice] = field(default_factory=list)


class Refinement(Strategy):
    """Descends at several budgets at once."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._problem = setting, setting.problem
        self._rows = np.arange(len(self._problem.loss))
        loss = np.where(self._problem.offered, self._problem.loss, 0.0)
        # differences of measurements may come out negative; only what is exactly zero is lossless
        prior = np.where(loss < 0, FLOOR * loss.max(axis=1, keepdims=True).clip(min=0), loss)
        self._fields = Fields(prior)
        self._generator = np.random.default_rng(setting.seed)
        self._order = self._generator.permutation(setting.chunks).tolist()
        self._waiting: dict[tuple[bytes, int, bool], list[_Descent]] = {}
        self._descents = []
        self.log = []
        for limit, maps in setting.starts.items():
            first, *others = [choice.astype(np.intp) for choice in maps]
            descent = _Descent(limit, first, others, history=[first])
            descent.done = not prior[self._rows, first].any()  # nothing to be better than
            self._descents.append(descent)
        self._told: dict[tuple[bytes, int], float] = {}  # gradients

    def ask(self) -> Question | None:
        """See `Strategy.ask`: the budget that has had least for what it promises.

        One that awaits nothing, if possible.
        """
        awaited = [id(d) for descents in self._waiting.values() for d in descents]
        going = [descent for descent in self._descents if not descent.done]
        for descent in sorted(going, key=lambda d: (awaited.count(id(d)), d.spent)):
            if (question := self._wanted(descent)) is not None:
                self._waiting.setdefault(_key(question), []).append(descent)
                cost = GRADIENT if question.slopes else 1
                descent.spent += cost / np.sqrt(max(descent.promise, LITTLE))
                return question
        return None

    def tell(self, question: Question, loss: float, slopes: Floats | None = None) -> None:
        """See `Strategy.tell`; where a question asked for slopes it wants them."""
        descent = self._waiting[_key(question)].pop(0)
        if slopes is not None:
            self._fields.see(question.choice, question.chunk, loss, np.nan_to_num(slopes))
            self._told[question.choice.tobytes(), question.chunk] = loss
            descent.told += 1
            descent.fresh = True
            if np.array_equal(question.choice, descent.incumbent):
                descent.losses[question.chunk] = loss
        elif (trial := descent.trial) and np.array_equal(question.choice, trial.choice):
            trial.losses[question.chunk] = loss
            self._judge(descent, trial)

    def best(self, limit: int) -> Choice:
        """The incumbent at a budget."""
        return self.history(limit)[-1]

    def history(self, limit: int) -> list[Choice]:
        """Incumbents at a budget, the first one first."""
        [descent] = [d for d in self._descents if d.limit == limit]
        return descent.history

    def _wanted(self, descent: _Descent) -> Question | None:
        ready = descent.fresh and descent.told >= min(FIRST, self._setting.chunks)
        if descent.lesson:
            question, descent.lesson = descent.lesson, None
            return question
        if descent.trial is None and ready:
            self._challenge(descent)
        if descent.trial and len(descent.trial.losses) == len(descent.trial.asked):
            return self._trial(descent, descent.trial)
        for _ in self._order:
            chunk = self._order[descent.turn % len(self._order)]
            descent.turn += 1
            question = Question(descent.incumbent, chunk, slopes=True)
            if chunk in descent.sloped or self._waiting.get(_key(question)):
                continue
            descent.sloped.add(chunk)
            known = self._told.get((descent.incumbent.tobytes(), chunk))
            if known is None:
                return question
            descent.losses[chunk] = known  # another budget has the same map
            descent.told += 1
            descent.fresh = True
            return self._wanted(descent)
        if descent.trial is None and len(descent.losses) == len(self._order):
            self._explore(descent)
            return self._trial(descent, descent.trial) if descent.trial else None
        return None

    def _trial(self, descent: _Descent, trial: _Trial) -> Question:
        """The candidate on the latest chunk of the incumbent that it wasn't measured on."""
        chunk = next(c for c in reversed(descent.losses) if c not in trial.asked)
        trial.asked.append(chunk)
        return Question(trial.choice, chunk)

    def _challenge(self, descent: _Descent) -> None:
        """Take a step on trust, or find the candidate of a trial."""
        descent.fresh = False
        while (found := self._propose(descent)) is not None:
            choice, step = found
            if choice.tobytes() in descent.rejected:
                if descent.trust <= LEAST:
                    return
                self._shorten(descent, choice)
            elif step.error >= TELLING * step.noise and descent.losses:
                descent.trial = _Trial(choice, step)
                return
            else:
                self._take(descent, choice, step)
                return
        self._promises(descent, 0.0)

    def _explore(self, descent: _Descent) -> None:
        """With all text used and no gain predicted: a trial under a table drawn from what is known."""
        for _ in range(DRAWS if descent.failures < PATIENCE else 0):
            trust = int(self._generator.integers(LEAST, TRUST + 1))
            table = self._fields.draw(descent.incumbent, self._generator)
            found = self._solve(descent, descent.incumbent, table, trust)
            if found is None or np.array_equal(found, descent.incumbent):
                continue
            if found.tobytes() not in descent.rejected:
                step = self._fields.step(descent.incumbent, found)
                descent.trial = _Trial(found, step)
                return

    def _propose(self, descent: _Descent) -> tuple[Choice, Step] | None:
        """The most promising step within the trusted changes; None where no gain is predicted."""
        if descent.others:
            choice = descent.others.pop(0)
            return choice, self._fields.step(descent.incumbent, choice)
        table = self._fields.around(descent.incumbent).table
        trusts = [max(LEAST, int(share * descent.trust)) for share in SHARES]
        choices = [self._solve(descent, descent.incumbent, table, trust) for trust in trusts]
        best = self._most_promising(descent, choices)
        descent.proposals += 1
        if best is None or descent.proposals % NEIGHBOURLY == 0:
            best = self._from_neighbours(descent) or best
        return best

    def _from_neighbours(self, descent: _Descent) -> tuple[Choice, Step] | None:
        """The map that another budget's incumbent becomes when it has to fit into this one."""
        choices = []
        for other in self._descents:
            if not (other.done or np.array_equal(other.incumbent, descent.incumbent)):
                table = self._fields.around(other.incumbent).table
                choices.append(self._solve(descent, other.incumbent, table, len(self._rows)))
        new = [c for c in choices if c is not None and c.tobytes() not in descent.rejected]
        return self._most_promising(descent, new)

    def _most_promising(
        self, descent: _Descent, choices: Sequence[Choice | None]
    ) -> tuple[Choice, Step] | None:
        at = descent.incumbent
        new = [c for c in choices if c is not None and not np.array_equal(c, at)]
        steps = [(choice, self._fields.step(at, choice)) for choice in new]
        best = min(steps, key=lambda found: found[1].change, default=None)
        return best if best and best[1].change < 0 else None

    def _solve(self, descent: _Descent, at: Choice, table: Floats, trust: int) -> Choice | None:
        problem = self._problem
        changes = np.ones(problem.loss.shape, dtype=np.int64)
        changes[self._rows, at] = 0
        local = Problem(
            np.where(problem.offered, table - table[self._rows, at][:, None], 0.0),
            {**problem.costs, CHANGES: changes}, problem.offered, problem.few, problem.names,
        )  # fmt: skip
        limits = {**self._setting.others, self._setting.resource: descent.limit, CHANGES: trust}
        try:
            return solve(local, limits, GAP, SECONDS).choice.astype(np.intp)
        except SearchError:
            return None

    def _judge(self, descent: _Descent, trial: _Trial) -> None:
        """Decide by what was predicted and what was found, once both together are sure enough."""
        step, count = trial.step, len(trial.losses)
        pairs = [(trial.losses[c], descent.losses[c]) for c in trial.asked if c in trial.losses]
        found = float(np.mean([np.log(max(new, 1e-9) / max(old, 1e-9)) for new, old in pairs]))
        weights = max(step.error, TINY) ** -2, count * max(step.noise, TINY) ** -2
        mean = (step.change * weights[0] + found * weights[1]) / sum(weights)
        more = [c for c in descent.losses if c not in trial.asked]
        if more and count < MOST and abs(mean) < CONFIDENCE * sum(weights) ** -0.5:
            return
        descent.trial = None
        better = mean < 0
        self._promises(descent, mean)
        self._note(descent, trial.choice, step, pairs, better=better)
        if not better:
            descent.failures += 1
            descent.rejected.add(trial.choice.tobytes())
            if abs(found - step.change) > SURPRISING * step.error:
                descent.lesson = Question(trial.choice, trial.asked[0], slopes=True)
            self._shorten(descent, trial.choice)
            return
        if step.change < 0 and mean / step.change > GOOD:
            self._lengthen(descent)
        elif step.change < 0 and mean / step.change < BAD:
            self._shorten(descent, trial.choice)
        self._accept(descent, trial.choice)
        descent.losses = trial.losses

    def _shorten(self, descent: _Descent, choice: Choice) -> None:
        moved = float((choice != descent.incumbent).sum())
        descent.trust = max(LEAST, SHORTER * min(moved, descent.trust))

    def _lengthen(self, descent: _Descent) -> None:
        descent.trust = min(descent.trust * LONGER, float(len(self._rows)))

    @staticmethod
    def _promises(descent: _Descent, change: float) -> None:
        descent.promise = FORGET * descent.promise + (1 - FORGET) * max(0.0, -change)
        descent.done = descent.promise < ENOUGH

    def _take(self, descent: _Descent, choice: Choice, step: Step) -> None:
        """A step on trust, if its gain is likely enough."""
        if step.change < -SURE * step.error:
            self._note(descent, choice, step, [], better=True)
            self._promises(descent, step.change)
            self._lengthen(descent)
            self._accept(descent, choice)
        else:
            self._promises(descent, 0.0)

    def _accept(self, descent: _Descent, choice: Choice) -> None:
        descent.incumbent, descent.losses, descent.sloped = choice, {}, set()
        descent.failures = 0
        descent.rejected.clear()
        descent.history.append(choice)

    def _note(
        self,
        descent: _Descent,
        choice: Choice,
        step: Step,
        pairs: list[tuple[float, float]],
        *,
        better: bool,
    ) -> None:
        """An entry of the log; steps on trust have neither `difference` nor `loss`."""
        entry = {
            "limit": float(descent.limit), "changes": float((choice != descent.incumbent).sum()),
            "predicted": step.change, "predicted_error": step.error, "noise": step.noise,
            "better": float(better), "chunks": float(len(pairs)),
        }  # fmt: skip
        if pairs:
            new, old = np.array(pairs).T
            error = step.noise * float(old.mean()) / np.sqrt(len(pairs))
            entry |= {
                "difference": float((new - old).mean()), "loss": float(old.mean()),
                "error": float(error),
            }  # fmt: skip
        self.log.append(entry)


def _key(question: Question) -> tuple[bytes, int, bool]:
    return question.choice.tobytes(), question.chunk, question.slopes
