"""HAWQ-V3's ResNet18: the exact optima under its size, BOPS and latency limits.

Inputs from the method's own notebook (arXiv 2011.10680, MIT licence); the optima by enumeration of
all assignments.
"""

import numpy as np
import pytest

from search.dynamic import solve_dynamic
from search.exact import solve
from search.problem import Problem

H = [0.06857826, 0.03162379, 0.03298575, 0.01205663, 0.02222431, 0.00596336, 0.06931772, 0.00807129,
     0.00372905, 0.00530698, 0.00209011, 0.00737569, 0.00210454, 0.00151197, 0.00158041, 0.00078146,
     0.00451841, 0.00098745, 0.00072944]  # fmt: skip
D8 = [0.0235, 0.0125, 0.0102, 0.0082, 0.0145, 0.0344, 0.0023, 0.0287, 0.0148, 0.0333, 0.0682, 0.0027,
      0.0448, 0.0336, 0.0576, 0.1130, 0.0102, 0.0947, 0.0532]  # fmt: skip
D4 = [6.7430, 3.9691, 3.3281, 2.6796, 4.7277, 10.5966, 0.6827, 9.0942, 4.8857, 10.7599, 21.7546,
      0.8603, 14.5324, 10.9651, 18.7706, 36.4044, 3.1572, 29.6994, 17.4016]  # fmt: skip
WEIGHTS = [36864, 36864, 36864, 36864, 73728, 147456, 8192, 147456, 147456, 294912, 589824, 32768,
           589824, 589824, 1179648, 2359296, 131072, 2359296, 2359296]  # fmt: skip
MACS = [115605504] * 4 + [57802752, 115605504, 6422528, 115605504, 115605504, 57802752, 115605504,
                          6422528, 115605504, 115605504, 57802752, 115605504, 6422528, 115605504,
                          115605504]  # fmt: skip
LATENCY4 = [.21094404, .21092674, .21104113, .21086851, .13642465, .19167506, .02532183, .19148203,
            .19142914, .11395316, .20556011, .01917474, .20566918, .20566509, .13185102, .22287786,
            .01790088, .22304611, .22286099]  # fmt: skip
LATENCY8 = [.36189111, .36211718, .31141909, .30454471, .19184896, .38948934, .0334169, .38904905,
            .3892859, .19134735, .34307431, .02802354, .34313329, .34310756, .21117103, .37376585,
            .02896843, .37398187, .37405185]  # fmt: skip
TIED = [(4, 6), (9, 11), (14, 16)]
"""Layers that share a scheme: what is added up must have one scale."""


def fused(table):
    """Rows of tied layers added to the first one's."""
    table = np.array(table).T.copy()
    for first, second in TIED:
        table[first] += table[second]
    return np.delete(table, [second for _, second in TIED], axis=0)


@pytest.fixture(scope="module")
def problem():
    loss = np.array(H) * np.array([D4, D8])
    costs = {
        "weight_bits": np.array([WEIGHTS, WEIGHTS]) * np.array([[4], [8]]),
        "bops": np.array([MACS, MACS]) * np.array([[1], [4]]),  # in 1/64 of a million
        "latency": np.rint(np.array([LATENCY4, LATENCY8]) * 1e8).astype(np.int64),  # in 1e-8 ms
    }
    costs = {name: fused(table) for name, table in costs.items()}
    return Problem(fused(loss), costs, np.ones((16, 2), dtype=bool))


def bits(solution):
    free = [layer for layer in range(19) if layer not in {second for _, second in TIED}]
    found = dict(zip(free, solution.choice, strict=True))
    for first, second in TIED:
        found[second] = found[first]
    return [8 if found[layer] else 4 for layer in range(19)]


LIMITS = {
    "weight_bits": (
        round(7.980469 * 2**20 * 8), 7.265625 * 2**20 * 8, 0.0745059,
        [4 if layer in {15, 17, 18} else 8 for layer in range(19)],
    ),
    "bops": (
        round(66.23232e6 * 64), 65.028096e6 * 64, 0.2156893,
        [8, 8, 8, 4, 8, 8, 8, 8, 4, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4],
    ),
    "latency": (
        round(4.24618e8), 4.220095e8, 0.2026738,
        [8, 8, 8, 8, 8, 4, 8, 8, 4, 8, 8, 8, 4, 4, 8, 4, 8, 4, 4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("resource", LIMITS)
def test_the_published_instance_is_solved_to_its_optimum(problem, resource):
    limit, used, omega, optimum = LIMITS[resource]
    solution = solve(problem, {resource: limit})
    assert bits(solution) == optimum
    assert solution.loss == pytest.approx(omega, abs=1e-7)
    assert solution.gap < 1e-9
    assert solution.costs[resource] == pytest.approx(used, rel=1e-6)
    if resource != "latency":  # which isn't a multiple of anything
        assert solve_dynamic(problem, resource, limit).loss == pytest.approx(solution.loss)


def test_ends_of_the_scale(problem):
    low, high = (problem.total_loss(np.full(16, column)) for column in (0, 1))
    assert low == pytest.approx(1.3077131, abs=1e-7)
    assert high == pytest.approx(0.0042579, abs=1e-7)


def test_all_three_limits_at_once(problem):
    limits = {resource: limit for resource, (limit, *_) in LIMITS.items()}
    together = solve(problem, limits)
    assert together.gap < 1e-9
    alone = [solve(problem, {resource: limit}).loss for resource, limit in limits.items()]
    assert together.loss >= max(alone)
    assert problem.breaks(together.choice, limits) is None
