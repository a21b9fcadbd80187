"""What a latency limit buys over a byte limit: maps at equal speed, and at equal loss.

For each byte budget, the solver's best map there (all others of its bytes lose more, by the table);
then the best map, of any bytes, that takes at most that map's time; and the fastest map whose
predicted loss is at most that map's. Limits on time are met as measured: a map that turns out slower
than predicted is fitted in, and the limit solved for once more. All are run on held-out text and end
to end in llama.cpp, in turns with a reference. Intervals are of paired differences over chunks of
text, and of ratios over pairs of tokens or prompts.

    python benchmarks/latency_search.py [--model demo] [--bits 4.5,5.25] [--json PATH]
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
from bitfront.measuring import measure
from bitfront.pipeline import open_planned, spec_of
from bitfront.plan import make_plan
from bitfront.profiling import Profile, time_maps
from bitfront.progress import Lines
from bitfront.proposals import candidate_of
from bitfront.run import Run
from bitfront.scoring import score
from bitfront.searching import open_pool
from bitfront.serving import measured_times, timed
from bitfront.settling import settled
from cost_models import weight_bytes
from cost_models.measured import Ratio
from cost_models.memory import PHASES, Phase
from search.exact import solve
from search.problem import Choice, Problem
from search.statistics import paired_difference
from store.database import Store, default_url
from store.tables import MapTime

MENU = (
    "gguf-q2_K,gguf-q3_K,gguf-q4_0,gguf-iq4_nl,gguf-mxfp4,gguf-q4_K,gguf-q5_0,gguf-q6_K,gguf-q8_0"
)
"""Without q4_1, q5_1 and what falls back to them: the demo model's weights lie on their grid."""
LOSS = "loss"
ROUNDS = 3
SCALE = 1e9  # losses as integers, for a limit on them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--menu", default=MENU)
    parser.add_argument("--bits", default="4.5,5.25")
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
        problem = _problem(run)
        rows = [_compared(run, times.profile, problem, budget) for budget in plan.budgets]
    document = {
        "device": times.profile.subject.place.device,
        "menu": arguments.menu,
        "budgets": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


def _problem(run: Run) -> Problem:
    """Loss, bytes, and the loss once more, as something to limit."""
    problem = run.plan.problem(score(run, run.plan.config.estimators[0]).mean)
    loss = np.maximum(problem.loss, 0)
    limited = np.ceil(loss / loss.max() * SCALE).astype(np.int64)
    return replace(problem, loss=loss, costs={**problem.costs, LOSS: limited})


def _compared(run: Run, profile: Profile, problem: Problem, budget: int) -> dict[str, object]:
    by_bytes = solve(problem, {weight_bytes.RESOURCE: budget - run.plan.other_bytes}).choice
    base = _timed(run, profile, by_bytes)
    maps = {"by bytes": (by_bytes, base)}
    for phase in PHASES:
        maps[f"equal {phase} time"] = _as_fast(run, profile, problem, phase, base)
    table = measured_times(profile).costs("decode").astype(np.float64)
    limit = problem.total_cost(by_bytes, LOSS)
    equal_loss = solve(replace(problem, loss=table), {LOSS: limit}).choice
    maps["equal loss"] = (equal_loss, _timed(run, profile, equal_loss))
    kl = _losses(run, [choice for choice, _ in maps.values()])
    return {
        "budget_bytes": budget,
        **{
            name: _row(run, choice, kl, by_bytes, row, base) for name, (choice, row) in maps.items()
        },
    }


def _timed(run: Run, profile: Profile, choice: Choice) -> MapTime:
    (row,) = time_maps(profile.subject, run.store, run.pool, run.progress, [choice])
    return row


def _as_fast(
    run: Run, profile: Profile, problem: Problem, phase: Phase, base: MapTime
) -> tuple[Choice, MapTime]:
    """The map of least loss that takes at most the time of another."""
    limit = profile.measured_s(base, phase)
    for _ in range(ROUNDS):
        times = measured_times(profile)
        costs = {**problem.costs, "time": times.costs(phase)}
        timed = replace(problem, costs=costs)
        choice = solve(timed, {"time": times.limit(phase, limit, run.plan.offered)}).choice
        row = _timed(run, profile, choice)
        if profile.measured_s(row, phase) <= limit:
            break
        profile = replace(profile, maps=(*profile.maps, (choice, row)))
    return choice, row


def _losses(run: Run, choices: list[Choice]) -> dict[str, object]:
    candidates = [candidate_of(run.plan, run.job.id, choice, "benchmark") for choice in choices]
    unique = list({c.map_hash: c for c in candidates}.values())
    heldout = run.plan.texts["heldout"]
    measure(run, unique, heldout, "held-out text")
    return losses(run.store, run.quality, unique, heldout.hashes)


def _row(
    run: Run, choice: Choice, kl: dict, against: Choice, row: MapTime, base: MapTime
) -> dict[str, object]:
    own, other = kl[run.plan.map_hash(choice)], kl[run.plan.map_hash(against)]
    gap = paired_difference(own.kl_sums, other.kl_sums, own.tokens)
    return {
        "weight_bytes": run.plan.weight_bytes(choice),
        "kl": own.kl.mean,
        "kl_more_than_by_bytes": [gap.low, gap.high],
        "decode_ratio": _ratio(
            Ratio.of(row.decode_s, row.reference_decode_s),
            Ratio.of(base.decode_s, base.reference_decode_s),
        ),
        "prefill_ratio": _ratio(
            Ratio.of(row.prefill_s, row.reference_prefill_s),
            Ratio.of(base.prefill_s, base.reference_prefill_s),
        ),
    }


def _ratio(own: Ratio, base: Ratio) -> list[float]:
    """How much longer, with the ends of a 95 % interval."""
    value, error = own.value / base.value, 1.96 * float(np.hypot(own.error, base.error))
    return [value * (1 - error), value, value * (1 + error)]


if __name__ == "__main__":
    main()
