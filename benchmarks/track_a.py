"""Track A: maps for any model folder, one for each number of bits, from one search of some minutes.

Symmetric integers of 2, 3, 4, 6 and 8 bits in groups of 64, round to nearest; embedding and head
untouched; q, k and v share a scheme, gate and up do. Everything is learned from one text. Writes
`bitfront-BITS.json` (linear name -> bits) and `log.json`, what the search did and cost.

    python benchmarks/track_a.py --model DIR --text SEARCH_TEXT --minutes 30 --out DIR
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import psutil

from bitfront.config import load_config
from bitfront.pipeline import spec_of
from bitfront.plan import Plan, make_plan
from cost_models import weight_bytes
from search.controls import uniform
from search.exact import sweep
from search.strategies import Setting, make_strategy
from sensitivity import ESTIMATORS, merge
from workers.session import Session

STARTED = psutil.Process().create_time()  # imports are part of the time
MENU = "int2-g64,int3-g64,int4-g64,int6-g64,int8-g64"
ESTIMATOR = "fisher-quantized"
BITS = (3.25, 3.5, 3.75, 4.25, 4.75, 5.25)
ESTIMATING = 0.08  # of the time
CHUNKS, LENGTH = 32, 512
MARGIN_S = 5.0


def elapsed() -> float:
    """Seconds since the process began."""
    return time.time() - STARTED


def plan_for(model: str, text: str, bits: tuple[float, ...], chunks: int) -> Plan:
    """The job: one text for calibration and search, divided by nobody."""
    size = {"source": text, "chunks": chunks, "length": LENGTH}
    small = {"source": text, "chunks": 2, "length": LENGTH}
    overrides = {
        "menu": MENU, "budgets": list(bits), "estimators": [ESTIMATOR], "quantizer": "rtn",
        "texts.calibration": small, "texts.heldout": small, "texts.search": size,
    }  # fmt: skip
    return make_plan(load_config(model, None, overrides))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", default=",".join(map(str, BITS)))
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    bits = tuple(float(b) for b in given.bits.split(","))
    given.out.mkdir(parents=True, exist_ok=True)
    plan = plan_for(given.model, given.text, bits, given.chunks)
    session = Session(spec_of(plan, os.environ.get("BITFRONT_CACHE")))
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    chunks = plan.texts["search"].ids
    model = session.evaluator.model
    torch.set_num_threads(os.cpu_count() or 1)
    ready = elapsed()

    tables, estimator = [], ESTIMATORS[ESTIMATOR]
    for share in estimator.shares(len(plan.choices), len(chunks)):
        tables.append(estimator.score(model, chunks, plan.choices, share))
        if elapsed() - ready > ESTIMATING * 60 * given.minutes:
            break
    problem = plan.problem(merge(tables).mean())
    estimated = elapsed()
    limits = {
        b: limit - plan.other_bytes for b, limit in zip(sorted(bits), plan.budgets, strict=True)
    }
    first = sweep(problem, weight_bytes.RESOURCE, limits.values())
    uniforms = [u for c in range(len(plan.menu)) if (u := uniform(problem, c)) is not None]
    starts = {
        limit: [
            solution.choice,
            *(u for u in uniforms if problem.total_cost(u, weight_bytes.RESOURCE) == limit),
        ]
        for limit, solution in zip(limits.values(), first, strict=True)
    }
    write(given.out, plan, {b: s.choice for b, s in zip(limits, first, strict=True)}, "start")

    setting = Setting(problem, weight_bytes.RESOURCE, starts, len(chunks), given.seed)
    refinement = make_strategy("refine", setting)
    asked, longest, told = 0, 0.0, 0
    while elapsed() + 1.2 * longest < 60 * given.minutes - MARGIN_S and (
        question := refinement.ask()
    ):
        start = time.perf_counter()
        names = tuple(scheme.name for scheme in plan.schemes(question.choice))
        found = session.slopes(names, chunks[question.chunk])
        tokens = found.loss.tokens
        refinement.tell(question, found.loss.kl_sum / tokens, found.sums / tokens)
        asked, longest = asked + 1, max(longest, time.perf_counter() - start)
        for entry in refinement.log[told:]:
            print(f"{elapsed():6.0f} s  {json.dumps(entry)}", flush=True)
        told = len(refinement.log)
    write(given.out, plan, {b: refinement.best(limit) for b, limit in limits.items()})
    log = {
        "seconds": {"ready": ready, "estimated": estimated, "all": elapsed()},
        "estimator_chunks": int(tables[0].tokens.max() / LENGTH) * len(tables),
        "questions": asked, "tokens": asked * LENGTH,
        "steps": refinement.log,
    }  # fmt: skip
    (given.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")


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
