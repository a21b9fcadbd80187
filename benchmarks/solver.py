"""The solver: a front of 224 units, a mixture of experts of 45,000 units under three budgets.

Beside it plain HiGHS and, where PuLP is installed, CBC on the same instances, in the same run and on
one core.

    python benchmarks/solver.py [--json PATH]
"""

import argparse
import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from search.errors import InfeasibleBudgetError
from search.exact import solve, solve_plain, sweep
from search.problem import Problem

BITS = np.array([2.5, 3.5, 4.5, 5.5, 6.5, 8.5, 9.0, 16.0])
BUDGETS = 100
PLAIN = 10  # of the budgets, for the solvers that take long
GAP, SECONDS = 1e-3, 60.0


def dense(units: int = 224, seed: int = 0) -> Problem:
    """Sizes and losses like those of a 7-billion-parameter model's linear layers."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([4096 * 4096, 4096 * 11008, 4096 * 12288], units)
    return Problem(
        _loss(rng, units), {"bytes": _bytes(sizes)}, np.ones((units, len(BITS)), dtype=bool)
    )


def mixture(units: int = 45_000, seed: int = 1) -> Problem:
    """Experts, three matrices each, by bytes and the seconds of prefill (compute) and decode (bytes).

    Popular experts decode more often; formats have speeds of their own.
    """
    rng = np.random.default_rng(seed)
    sizes = np.full(units, 2048 * 7168)
    traffic = rng.lognormal(0, 1, units)[:, None]
    nbytes = _bytes(sizes)
    speed = np.array([1.0, 0.9, 2.0, 0.8, 0.9, 1.8, 2.0, 1.0])  # of the matrix product, by format
    overhead = np.array([1.2, 1.2, 1.0, 1.3, 1.2, 1.0, 1.0, 1.0])  # of reading it
    costs = {
        "bytes": nbytes,
        "prefill_ns": np.rint(traffic * sizes[:, None] / 1e4 / speed).astype(np.int64),
        "decode_ns": np.rint(traffic * nbytes / 3e3 * overhead).astype(np.int64),
    }
    return Problem(_loss(rng, units) * traffic, costs, np.ones((units, len(BITS)), dtype=bool))


def _bytes(sizes: np.ndarray) -> np.ndarray:
    return (sizes[:, None] * BITS / 8).astype(np.int64)


def _loss(rng: np.random.Generator, units: int) -> np.ndarray:
    scale = rng.lognormal(0, 1.5, (units, 1))
    return scale * 4.0**-BITS * rng.lognormal(0, 0.1, (units, len(BITS)))


def cbc(problem: Problem, limits: Mapping[str, int]) -> tuple[float, float] | None:
    """Seconds and loss of CBC through PuLP; None where PuLP is missing."""
    try:
        import pulp
    except ImportError:
        return None
    start = time.perf_counter()
    program = pulp.LpProblem("allocation", pulp.LpMinimize)
    units, schemes = problem.loss.shape
    x = pulp.LpVariable.dicts("x", (range(units), range(schemes)), cat="Binary")
    pairs = [(u, s) for u in range(units) for s in range(schemes)]
    scale = 1e5 / float(problem.loss.max())  # well above CBC's tolerances
    program += pulp.lpSum(scale * float(problem.loss[u, s]) * x[u][s] for u, s in pairs)
    for u in range(units):
        program += pulp.lpSum(x[u].values()) == 1
    for name, limit in limits.items():
        cost = problem.costs[name] / limit
        program += pulp.lpSum(float(cost[u, s]) * x[u][s] for u, s in pairs) <= 1
    program.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=1e-9, timeLimit=SECONDS))
    return time.perf_counter() - start, float(pulp.value(program.objective)) / scale


def front() -> dict[str, object]:
    """All budgets of the dense instance."""
    problem = dense()
    cost = problem.costs["bytes"]
    ends = cost.min(1).sum(), cost.max(1).sum()
    budgets = np.linspace(*ends, BUDGETS).astype(np.int64).tolist()
    start = time.perf_counter()
    solutions = sweep(problem, "bytes", budgets)
    swept = time.perf_counter() - start
    some = range(BUDGETS // PLAIN // 2, BUDGETS, BUDGETS // PLAIN)
    start = time.perf_counter()
    plain = [solve_plain(problem, {"bytes": budgets[i]}) for i in some]
    plain_s = (time.perf_counter() - start) / len(plain) * BUDGETS
    found = [cbc(problem, {"bytes": budgets[i]}) for i in some]
    known = [pair for pair in found if pair]
    return {
        "units": len(cost), "schemes": len(BITS), "budgets": BUDGETS,
        "sweep_s": swept, "goal_s": 3,
        "plain_highs_s": plain_s,
        "cbc_s": sum(s for s, _ in known) / len(known) * BUDGETS if known else None,
        "largest_gap": max(solution.gap for solution in solutions),
        "largest_difference_from_plain": max(
            abs(solutions[i].loss - p.loss) / p.loss for i, p in zip(some, plain, strict=True)
        ),
        "cbc_over_ours": max(
            pair[1] / solutions[i].loss - 1 for i, pair in zip(some, found, strict=True) if pair
        ) if known else None,
    }  # fmt: skip


def experts(units: int) -> dict[str, object]:
    """The mixture under three budgets that all bind: what the first alone would take, and less."""
    problem = mixture(units)
    low = problem.smallest("bytes")
    nbytes = int(low + 0.18 * (problem.costs["bytes"].max(1).sum() - low))
    freely = solve(problem, {"bytes": nbytes}, GAP, SECONDS).costs
    limits = {
        "bytes": nbytes,
        "prefill_ns": int(0.8 * freely["prefill_ns"]),
        "decode_ns": int(0.98 * freely["decode_ns"]),
    }
    start = time.perf_counter()
    try:
        solution = solve(problem, limits, GAP, SECONDS)
    except InfeasibleBudgetError as error:
        raise SystemExit(str(error)) from error
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    alone = {r: solve(problem, {r: limit}, GAP, SECONDS).loss for r, limit in limits.items()}
    return {
        "units": units, "schemes": len(BITS), "limits": limits, "used": dict(solution.costs),
        "seconds": seconds, "goal_s": 20, "gap": solution.gap, "goal_gap": GAP, "peak_bytes": peak,
        "loss_over_that_of_one_budget": {r: solution.loss / loss for r, loss in alone.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--units", type=int, default=45_000)
    given = parser.parse_args()
    results = {"mixture": experts(given.units), "front": front()}
    text = json.dumps(results, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
