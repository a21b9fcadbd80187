"""Allocators that are an estimator and a solver.

HIGGS (noise injection, dynamic programming), HAWQ (Hessian trace times squared error, integer
programming), and any other estimator of ours.

    python benchmarks/peers/by_scores.py MODEL_DIR TEXT OUT_DIR --allocator higgs|hawq|ESTIMATOR
"""

import os

from maps import BITS, GROUP, arguments, write  # isort: split

import torch

from bitfront.config import load_config
from bitfront.pipeline import spec_of
from bitfront.plan import make_plan
from cost_models import weight_bytes
from search.dynamic import solve_dynamic
from search.exact import solve
from sensitivity import ESTIMATORS, merge
from workers.session import Session

ALLOCATORS = {"higgs": "higgs", "hawq": "hessian-trace"}
PROGRAMMED = "higgs"


def main() -> None:
    given = arguments(__doc__, chunks=4, length=512, allocator={"required": True})
    name = ALLOCATORS.get(given.allocator, given.allocator)
    text = {"source": given.text, "chunks": given.chunks, "length": given.length}
    menu = ",".join(f"int{bits}-g{GROUP}" for bits in BITS)
    plan = make_plan(load_config(given.model, None, {
        "menu": menu, "budgets": given.bits, "estimators": [name], "quantizer": "rtn",
        **{f"texts.{role}": text for role in ("calibration", "search", "heldout")},
    }))  # fmt: skip
    session = Session(spec_of(plan, os.environ.get("BITFRONT_CACHE")))
    session.prepare()
    torch.set_num_threads(os.cpu_count() or 1)
    estimator, chunks = ESTIMATORS[name], plan.texts["calibration"].ids
    model = session.evaluator.model
    shares = estimator.shares(len(plan.choices), len(chunks))
    table = merge([estimator.score(model, chunks, plan.choices, s) for s in shares]).mean()
    problem = plan.problem(table)
    for bits, budget in zip(sorted(given.bits), plan.budgets, strict=True):
        limit = budget - plan.other_bytes
        if given.allocator == PROGRAMMED:
            choice = solve_dynamic(problem, weight_bytes.RESOURCE, limit).choice
        else:
            choice = solve(problem, {weight_bytes.RESOURCE: limit}).choice
        sizes, found = {}, {}
        for u, scheme in zip(plan.layout.units, plan.schemes(choice), strict=True):
            for site in u.sites if scheme.weight != "bf16" else ():
                linear = site.name.removesuffix(".weight")
                sizes[linear] = site.numel
                found[linear] = int(scheme.weight.removeprefix("int").split("-")[0])
        write(given.out, given.allocator, bits, sizes, found)


if __name__ == "__main__":
    main()
