"""Strategies on the demo model: hypervolume of the front against the number of measured tokens.

All begin with the same estimator's optima, choose by the same search text, and get as many passes
over tokens; a measurement with slopes counts as four. Their fronts are then measured on held-out text.

    python benchmarks/strategies.py SEARCH_TEXT HELDOUT_TEXT [--passes 400] [--json PATH]
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitfront.config import load_config
from bitfront.pipeline import spec_of
from bitfront.plan import Plan, make_plan
from cost_models import weight_bytes
from search.controls import uniform
from search.exact import sweep
from search.front import hypervolume
from search.strategies import Setting, Strategy, make_strategy
from sensitivity import ESTIMATORS, merge
from workers.session import Session

MENU = "int2-g64,int3-g64,int4-g64,int6-g64,int8-g64"
BITS = (3.25, 3.5, 3.75, 4.25, 4.75, 5.25)
ESTIMATOR = "fisher-quantized"
STRATEGIES = ("refine", "evolve", "surrogate", "optuna:NSGAIISampler", "optuna:TPESampler")
SLOPES = 4  # passes that a measurement with slopes counts as
POINTS = 5  # of each curve


class Comparison:
    """One model, its texts, and what was measured of it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.session = Session(spec_of(plan, os.environ.get("BITFRONT_CACHE")))
        self.session.prepare()
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        self.measured: dict[tuple[bytes, str, int], float] = {}

    def kl(self, choice: np.ndarray, role: str, chunk: int) -> float:
        """Nats per token, measured once."""
        key = (choice.tobytes(), role, chunk)
        if key not in self.measured:
            names = tuple(scheme.name for scheme in self.plan.schemes(choice))
            found = self.session.measure(names, self.plan.texts[role].ids[chunk])
            self.measured[key] = found.kl_sum / found.tokens
        return self.measured[key]

    def heldout(self, choice: np.ndarray) -> float:
        """Mean KL on held-out text."""
        chunks = range(len(self.plan.texts["heldout"].ids))
        return float(np.mean([self.kl(choice, "heldout", chunk) for chunk in chunks]))

    def run(
        self, strategy: Strategy, limits: Sequence[int], passes: int
    ) -> list[list[list[float]]]:
        """At `POINTS` places on the way, cost and held-out KL of the best map of each budget."""

        def front(strategy: Strategy) -> list[list[float]]:
            best = [strategy.best(limit) for limit in limits]
            return [[self.plan.weight_bytes(b), self.heldout(b)] for b in best]

        spent, curve = 0, []
        texts = self.plan.texts["search"].ids
        while len(curve) <= POINTS:
            if spent >= len(curve) * passes / POINTS:
                curve.append(front(strategy))
            if (question := strategy.ask()) is None:
                break
            spent += SLOPES if question.slopes else 1
            if question.slopes:
                names = tuple(scheme.name for scheme in self.plan.schemes(question.choice))
                found = self.session.slopes(names, texts[question.chunk])
                tokens = found.loss.tokens
                strategy.tell(question, found.loss.kl_sum / tokens, found.sums / tokens)
            else:
                strategy.tell(question, self.kl(question.choice, "search", question.chunk))
        if len(curve) <= POINTS:  # it had nothing more to ask
            curve += [front(strategy)] * (POINTS + 1 - len(curve))
        return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("search")
    parser.add_argument("heldout")
    parser.add_argument("--passes", type=int, default=400, help="a map on a chunk each")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    texts = {
        f"texts.{role}": {"source": source, "chunks": chunks, "length": given.length}
        for role, source, chunks in (
            ("calibration", given.search, 8),
            ("search", given.search, 16),
            ("heldout", given.heldout, 8),
        )
    }
    plan = make_plan(load_config("demo", None, {"menu": MENU, "budgets": list(BITS), **texts}))
    comparison = Comparison(plan)
    estimator, ids = ESTIMATORS[ESTIMATOR], plan.texts["calibration"].ids
    shares = estimator.shares(len(plan.choices), len(ids))
    model = comparison.session.evaluator.model
    table = merge(estimator.score(model, ids, plan.choices, share) for share in shares).mean()
    problem = plan.problem(table)
    limits = [budget - plan.other_bytes for budget in plan.budgets]
    solved = sweep(problem, weight_bytes.RESOURCE, limits)
    starts = {limit: [solution.choice] for limit, solution in zip(limits, solved, strict=True)}
    setting = Setting(problem, weight_bytes.RESOURCE, starts, len(plan.texts["search"].ids))
    lowest = uniform(problem, 1)  # of 3.25 bits: what a front may not be worse than
    assert lowest is not None
    reference = plan.weight_bytes(solved[-1].choice) * 1.01, comparison.heldout(lowest) * 1.2
    results: dict[str, object] = {
        "passes": given.passes, "length": given.length, "bits": BITS, "reference": reference,
        "strategies": {},
    }  # fmt: skip
    for name in given.strategies.split(","):
        curve = comparison.run(make_strategy(name, setting), limits, given.passes)
        volumes = [hypervolume(*np.array(front).T, reference) for front in curve]
        over = [round(volume / volumes[0], 4) for volume in volumes]
        last = [round(kl, 4) for _, kl in curve[-1]]
        print(f"{name:<24} hypervolume over the start's {over}, KL {last}", flush=True)
        results["strategies"][name] = {"hypervolume_over_start": over, "fronts": curve}
        if given.json:
            given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
