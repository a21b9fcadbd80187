"""Track A: maps for any model folder, one for each number of bits, from one search of some minutes.

Symmetric integers of 2, 3, 4, 6 and 8 bits in groups of 64, round to nearest (or another quantizer,
whose calibration and bank are part of the time); embedding and head untouched; q, k and v share a
scheme, gate and up do. Everything is learned from one text. Writes
`bitfront-BITS.json` (linear name -> bits) and `log.json`, what the search did and cost.

    python benchmarks/track_a.py --model DIR --text SEARCH_TEXT --minutes 30 --out DIR
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bitfront.config import load_config
from bitfront.pipeline import spec_of
from bitfront.plan import Plan, make_plan
from cost_models import weight_bytes
from evaluation.assembly import AssembledModel
from quantization.errors import MeasurementError, TextError
from search.controls import uniform
from search.exact import sweep
from search.strategies import Question, Setting
from search.strategies.refinement import Refinement
from sensitivity import ESTIMATORS, merge
from workers.session import Session

STARTED = psutil.Process().create_time()  # imports are part of the time
MENU = "int2-g64,int3-g64,int4-g64,int6-g64,int8-g64"
ESTIMATOR = "fisher-quantized"
BITS = (3.25, 3.5, 3.75, 4.25, 4.75, 5.25)
ESTIMATING, JUDGING = 0.05, 0.05  # of the time
JUDGES, EARLIER = 8, 4  # chunks, and how many maps before the last one
CHUNKS, FEWEST, LENGTH = 80, 8, 512
CALIBRATION = 32
MARGIN_S = 5.0


def elapsed() -> float:
    """Seconds since the process began."""
    return time.time() - STARTED


def plan_for(
    model: str, text: str, bits: tuple[float, ...], chunks: int, **overrides: object
) -> Plan:
    """The job: one text for calibration and search; fewer chunks of a short one."""
    while True:
        size = {"source": text, "chunks": chunks, "length": LENGTH}
        small = {"source": text, "chunks": 2, "length": LENGTH}
        settings: dict[str, Any] = {
            "menu": MENU, "budgets": list(bits), "estimators": [ESTIMATOR], "quantizer": "rtn",
            "texts.calibration": small, "texts.heldout": small, "texts.search": size, **overrides,
        }  # fmt: skip
        learned = settings["texts.calibration"]
        settings["texts.calibration"] = {**learned, "chunks": min(learned["chunks"], chunks)}
        try:
            return make_plan(load_config(model, None, settings))
        except TextError:
            if chunks <= FEWEST:
                raise
            chunks = max(chunks // 2, FEWEST)


class Searcher:
    """One plan, searched within a time.

    Attributes:
        limits: bytes of the decided units by average bits.
        first: the estimator's optimum by average bits.
        log: what the search did and cost.
    """

    def __init__(self, plan: Plan, minutes: float, seed: int, *, from_now: bool = False) -> None:
        self.plan, self.seed = plan, seed
        self.clock = Clock(60 * minutes - MARGIN_S, elapsed() if from_now else 0.0)
        self.session = Session(spec_of(plan, os.environ.get("BITFRONT_CACHE")))
        self._model = self.session.evaluator.model
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        self.chunks = plan.texts["search"].ids
        self.log: dict[str, Any] = {"seconds": {"ready": elapsed()}}
        bits = sorted(plan.config.budgets or ())
        self.limits = {
            b: limit - plan.other_bytes for b, limit in zip(bits, plan.budgets, strict=True)
        }
        self._asked: Counter[str] = Counter()
        try:
            table = self._estimate()
        except MeasurementError as error:  # a model that can't be cut into blocks
            self.log["failed"] = str(error)
            table = weight_errors(self._model, self.chunks, plan)
        self._problem = plan.problem(table)
        found = sweep(self._problem, weight_bytes.RESOURCE, self.limits.values())
        self.first = {b: s.choice for b, s in zip(bits, found, strict=True)}

    def _estimate(self) -> np.ndarray:
        """The estimator's table, from as much text as its part of the time allows."""
        tables, estimator = [], ESTIMATORS[self.plan.config.estimators[0]]
        for share in estimator.shares(len(self.plan.choices), len(self.chunks)):
            with self.clock.step():
                tables.append(estimator.score(self._model, self.chunks, self.plan.choices, share))
            spent = elapsed() - self.log["seconds"]["ready"]
            if spent > ESTIMATING * self.clock.seconds or not self.clock.allows(0.5):
                break
        self.log["seconds"]["estimated"] = elapsed()
        self.log["estimator_tokens"] = int(sum(table.tokens.max() for table in tables))
        return merge(tables).mean()

    def _starts(self) -> dict[int, list[np.ndarray]]:
        """The optimum, and uniform maps of exactly as many bytes."""
        flat = [uniform(self._problem, column) for column in range(len(self.plan.menu))]
        cost = self._problem.total_cost
        return {
            limit: [self.first[b]]
            + [u for u in flat if u is not None and cost(u, weight_bytes.RESOURCE) == limit]
            for b, limit in self.limits.items()
        }

    def search(self) -> dict[float, np.ndarray]:
        """The best map by average bits."""
        kept = JUDGES if len(self.chunks) > 3 * JUDGES else 0  # for the end, unseen until then
        setting = Setting(
            self._problem, weight_bytes.RESOURCE, self._starts(), len(self.chunks) - kept, self.seed
        )
        search = Refinement(setting)
        self.clock.longest, told = 0.0, 0
        going = True
        while going and self.clock.allows(1 - JUDGING):
            try:
                with self.clock.step():  # solving takes its time, too
                    going = self._step(search)
            except MeasurementError as error:  # what was found until now is there
                self.log["failed"] = str(error)
                break
            for entry in search.log[told:]:
                print(f"{elapsed():6.0f} s  {json.dumps(entry)}", flush=True)
            told = len(search.log)
        self.log["seconds"]["refined"] = elapsed()
        histories = {b: search.history(limit) for b, limit in self.limits.items()}
        best = self._judge(histories)
        self.log["seconds"]["all"] = elapsed()
        self.log |= {
            "gradients": self._asked["gradient"], "measurements": self._asked["measurement"],
            "tokens": LENGTH * self._asked.total(),
            "maps": {b: len(maps) for b, maps in histories.items()}, "steps": search.log,
        }  # fmt: skip
        return best

    def _step(self, search: Refinement) -> bool:
        """Answer the next question; False where there is none."""
        if question := search.ask():
            self._measure(search, question)
        return question is not None

    def _measure(self, search: Refinement, question: Question) -> None:
        chunk = self.chunks[question.chunk]
        if question.slopes:
            names = tuple(scheme.name for scheme in self.plan.schemes(question.choice))
            self._asked["gradient"] += 1
            found = self.session.slopes(names, chunk)
            tokens = found.loss.tokens
            search.tell(question, found.loss.kl_sum / tokens, found.sums / tokens)
        else:
            search.tell(question, self.kl(question.choice, chunk))

    def kl(self, choice: np.ndarray, chunk: np.ndarray) -> float:
        """Of a map on a chunk, nats per token."""
        self._asked["measurement"] += 1
        found = self.session.measure(tuple(s.name for s in self.plan.schemes(choice)), chunk)
        return found.kl_sum / found.tokens

    def _judge(self, histories: dict[float, list[np.ndarray]]) -> dict[float, np.ndarray]:
        """Of each budget's last map, one before it and the first: the best.

        On fresh chunks, unless the text is so short that the search has had all of it.
        """
        finals = {}
        for bits, maps in histories.items():
            last = len(maps) - 1
            finals[bits] = [maps[i] for i in sorted({0, max(0, last - EARLIER), last})[::-1]]
        sums = {bits: np.zeros(len(maps)) for bits, maps in finals.items()}
        self.clock.longest = 0.0
        for chunk in self.chunks[::-1][:JUDGES]:
            for bits, maps in finals.items():
                found: list[float] = []
                while self.clock.allows() and len(found) < len(maps) > 1:
                    with self.clock.step():
                        found.append(self._log_kl(maps[len(found)], chunk))
                if len(found) == len(maps):
                    sums[bits] += found
        return {bits: maps[int(np.argmin(sums[bits]))] for bits, maps in finals.items()}

    def _log_kl(self, choice: np.ndarray, chunk: np.ndarray) -> float:
        """Of a map on a chunk; infinite where it can't be measured, so that another one wins."""
        try:
            return float(np.log(max(self.kl(choice, chunk), 1e-12)))
        except MeasurementError:
            return float("inf")


def weight_errors(model: AssembledModel, chunks: np.ndarray, plan: Plan) -> np.ndarray:
    """A table that needs nothing but the weights."""
    estimator = ESTIMATORS["weight-error"]
    shares = estimator.shares(len(plan.choices), len(chunks))
    return merge([estimator.score(model, chunks, plan.choices, s) for s in shares]).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", default=",".join(map(str, BITS)))
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quantizer", default="rtn", help="others calibrate on the same text")
    parser.add_argument(
        "--estimator", default=ESTIMATOR, help="row-fisher where errors are fed back"
    )
    given = parser.parse_args()
    bits = tuple(sorted({float(b) for b in given.bits.split(",")}))
    given.out.mkdir(parents=True, exist_ok=True)
    learned = {"source": given.text, "chunks": CALIBRATION, "length": LENGTH}
    plan = plan_for(
        given.model, given.text, bits, given.chunks,
        quantizer=given.quantizer, estimators=[given.estimator],
        **{} if given.quantizer == "rtn" else {"texts.calibration": learned},
    )  # fmt: skip
    searcher = Searcher(plan, given.minutes, given.seed)
    for name in ("start", "bitfront"):  # whatever happens next, there are maps
        write(given.out, plan, searcher.first, name)
    write(given.out, plan, searcher.search())
    (given.out / "log.json").write_text(json.dumps(searcher.log, indent=1) + "\n")


class Clock:
    """Whether there is time for one more piece of work, as long as the longest so far."""

    def __init__(self, seconds: float, start: float = 0.0) -> None:
        self.seconds, self.start, self.longest = seconds, start, 0.0

    def allows(self, share: float = 1.0) -> bool:
        """Whether it would end within a share of the time."""
        return elapsed() - self.start + 1.2 * self.longest < share * self.seconds

    @contextmanager
    def step(self) -> Iterator[None]:
        """A piece of work."""
        start = time.perf_counter()
        yield
        self.longest = max(self.longest, time.perf_counter() - start)


def write(out: Path, plan: Plan, maps: dict[float, np.ndarray], name: str = "bitfront") -> None:
    """One file a map, in the evaluator's form."""
    for bits, choice in maps.items():
        found = {}
        for unit, scheme in zip(plan.layout.units, plan.schemes(choice), strict=True):
            if scheme.weight != "bf16":
                width = int(scheme.weight.removeprefix("int").split("-")[0])
                found.update({site.name.removesuffix(".weight"): width for site in unit.sites})
        (out / f"{name}-{bits:g}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
