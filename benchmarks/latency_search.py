"""What a latency limit buys over a byte limit: maps at equal speed, and at equal loss.

For each byte budget, the solver's best map there (all others of its bytes lose more, by the table);
then the best map, of any bytes, whose predicted time per token is at most that map's; and the fastest
map whose predicted loss is at most that map's. All are run on held-out text and end to end in
llama.cpp, in turns with a reference. Intervals are of paired differences over chunks of text, and of
ratios over pairs of tokens.

    python benchmarks/latency_search.py [--model demo] [--bits 5,5.5,6] [--json PATH]
"""

import argparse
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from bitfront.config import load_config
from bitfront.console import errors
from bitfront.fronts import losses
from bitfront.pipeline import measure, open_planned, spec_of
from bitfront.plan import make_plan, settled
from bitfront.profiling import Choice, Profile, time_maps
from bitfront.progress import Lines
from bitfront.proposals import candidate_of
from bitfront.run import Run
from bitfront.scoring import score
from bitfront.searching import open_pool
from bitfront.serving import timed
from cost_models import weight_bytes
from cost_models.measured import Ratio
from search.exact import solve
from search.problem import Problem
from search.statistics import paired_difference
from store.database import Store, default_url
from store.tables import MapTime

MENU = "gguf-q4_0,gguf-iq4_nl,gguf-q5_0,gguf-q5_1,gguf-q6_K,gguf-q8_0"
DECODE, LOSS = "decode_ns", "loss"
SCALE = 1e9  # losses as integers, for a limit on them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--menu", default=MENU)
    parser.add_argument("--bits", default="5,5.5,6")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--store", default=default_url())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    budgets = [float(bits) for bits in arguments.bits.split(",")]
    overrides = {
        "menu": arguments.menu, "budgets": budgets, "serving.engine": "llama.cpp",
        "serving.prompt": arguments.prompt, "serving.context": arguments.context,
        "texts.heldout.chunks": 24,
    }  # fmt: skip
    store = Store(arguments.store).open()
    plan = settled(make_plan(load_config(arguments.model, None, overrides)), store)
    opener = partial(open_pool, address="none", workers=1)
    with Lines(errors) as progress, opener(spec_of(plan, os.environ.get("BITFRONT_CACHE"))) as pool:
        run = Run(plan, store, pool, progress, open_planned(plan, store))
        times = timed(plan, store, pool, progress)
        assert times is not None
        assert times.profile is not None
        problem = _problem(run, times.costs("decode"))
        rows = [_compared(run, times.profile, problem, budget) for budget in plan.budgets]
    document = {
        "device": times.profile.subject.place.device,
        "menu": arguments.menu,
        "budgets": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


def _problem(run: Run, decode_ns: np.ndarray) -> Problem:
    """Loss, bytes, nanoseconds a token, and the loss once more, as something to limit."""
    problem = run.plan.problem(score(run, run.plan.config.estimators[0]).mean)
    loss = np.maximum(problem.loss, 0)
    costs = {
        **problem.costs, DECODE: decode_ns,
        LOSS: np.ceil(loss / loss.max() * SCALE).astype(np.int64),
    }  # fmt: skip
    return replace(problem, loss=loss, costs=costs)


def _compared(run: Run, profile: Profile, problem: Problem, budget: int) -> dict[str, object]:
    by_bytes = solve(problem, {weight_bytes.RESOURCE: budget - run.plan.other_bytes}).choice
    equal_speed = solve(problem, {DECODE: problem.total_cost(by_bytes, DECODE)}).choice
    fastest = replace(problem, loss=problem.costs[DECODE].astype(np.float64))
    equal_loss = solve(fastest, {LOSS: problem.total_cost(by_bytes, LOSS)}).choice
    maps = {"by bytes": by_bytes, "equal speed": equal_speed, "equal loss": equal_loss}
    kl = _losses(run, list(maps.values()))
    rows = time_maps(
        profile.subject, run.store, run.pool, run.progress, list(maps.values()),
        profile.subject.anchors[0],
    )  # fmt: skip
    found: dict[str, object] = {"budget_bytes": budget}
    for name, choice, row in zip(maps, maps.values(), rows, strict=True):
        found[name] = _row(run, profile, choice, kl, by_bytes, row, rows[0])
    return found


def _losses(run: Run, choices: list[Choice]) -> dict[str, object]:
    candidates = [candidate_of(run.plan, run.job.id, choice, "benchmark") for choice in choices]
    unique = list({c.map_hash: c for c in candidates}.values())
    heldout = run.plan.texts["heldout"]
    measure(run, unique, heldout, "held-out text")
    return losses(run.store, run.quality, unique, heldout.hashes)


def _row(
    run: Run,
    profile: Profile,
    choice: Choice,
    kl: dict,
    against: Choice,
    row: MapTime,
    base: MapTime,
) -> dict[str, object]:
    own, other = kl[run.plan.map_hash(choice)], kl[run.plan.map_hash(against)]
    gap = paired_difference(own.kl_sums, other.kl_sums, own.tokens)
    speed = Ratio.of(row.decode_s, row.reference_decode_s)
    usual = Ratio.of(base.decode_s, base.reference_decode_s)
    error = 1.96 * float(np.hypot(speed.error, usual.error))
    ratio = speed.value / usual.value
    return {
        "weight_bytes": run.plan.weight_bytes(choice),
        "kl": own.kl.mean,
        "kl_less_than_by_bytes": [gap.low, gap.high],
        "decode_ms": 1e3 * profile.measured_s(row, "decode"),
        "decode_predicted_ms": 1e3 * profile.predict(choice, "decode")[0],
        "decode_ratio_to_by_bytes": [ratio * (1 - error), ratio * (1 + error)],
    }


if __name__ == "__main__":
    main()
