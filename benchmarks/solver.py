"""The exact solver: 224 units x 8 schemes, 50 budgets, beside one plain HiGHS call a budget.

python benchmarks/solver.py
"""

import json
import time

import numpy as np

from search.exact import solve_plain, sweep
from search.problem import Problem


def instance(seed: int = 0, units: int = 224) -> Problem:
    """Sizes and losses like those of a 7-billion-parameter model's linear layers."""
    rng = np.random.default_rng(seed)
    bits = np.array([2.5, 3.5, 4.5, 5.5, 6.5, 8.5, 9.0, 16.0])
    sizes = rng.choice([4096 * 4096, 4096 * 11008, 4096 * 12288], units)
    cost = (sizes[:, None] * bits / 8).astype(np.int64)
    loss = rng.lognormal(0, 1.5, (units, 1)) * 4.0**-bits * rng.lognormal(0, 0.1, (units, 8))
    return Problem(loss, {"bytes": cost}, np.ones((units, 8), dtype=bool))


def main() -> None:
    problem = instance()
    cost = problem.costs["bytes"]
    budgets = np.linspace(cost.min(1).sum(), cost.max(1).sum(), 50).astype(np.int64).tolist()
    start = time.perf_counter()
    solutions = sweep(problem, "bytes", budgets)
    swept = time.perf_counter() - start
    start = time.perf_counter()
    plain = [solve_plain(problem, {"bytes": budget}) for budget in budgets[::5]]
    each = (time.perf_counter() - start) / len(plain)
    worst = max(abs(a.loss - b.loss) / b.loss for a, b in zip(solutions[::5], plain, strict=True))
    print(json.dumps({
        "units": 224, "schemes": 8, "budgets": 50,
        "sweep_s": round(swept, 3),
        "plain_highs_s": round(50 * each, 3),
        "ratio": round(swept / (50 * each), 3),
        "largest_gap": max(solution.gap for solution in solutions),
        "largest_difference_from_plain": worst,
        "goal_s": 5,
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
