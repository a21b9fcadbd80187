"""The audit's statistics: right rankings score one, and what should fail does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from search.audit import EQUAL, FLIPS, MIXED, Maps, judge, null_arms, rank_interval, totals
from search.controls import random_exactly, random_walk, uniform
from search.problem import Problem

UNITS, SIZES = 40, np.array([2, 3, 4, 6, 8])


def make_problem(seed=0):
    generator = np.random.default_rng(seed)
    numel = generator.choice([3, 5, 8, 16], UNITS) * 64
    cost = numel[:, None] * SIZES
    loss = np.exp(generator.normal(0, 1.5, (UNITS, 1))) * 4.0**-SIZES * numel[:, None]
    return Problem(loss, {"weight_bytes": cost}, np.ones_like(cost, dtype=bool))


def make_maps(problem, truth, noise=0.0, seed=0):
    generator = np.random.default_rng(seed)
    start = uniform(problem, 1)
    size = problem.total_cost(start, "weight_bytes")
    choices, groups = [], []
    for i in range(60):
        target = int(size * (1 + i / 90))
        choices.append(random_exactly(problem, "weight_bytes", target, generator))
        groups.append(MIXED)
    for _ in range(60):
        choices.append(random_walk(problem, "weight_bytes", start, 20, generator))
        groups.append(f"{EQUAL} 3")
    choices = np.array(choices)
    kl = totals(truth, choices) * np.exp(generator.normal(0, noise, len(choices)))
    bits = choices @ np.zeros(UNITS) + SIZES[choices].mean(axis=1)
    return Maps(choices, kl, bits, groups)


def test_a_perfect_table_scores_one_everywhere():
    problem = make_problem()
    verdict = judge(3.0 * problem.loss, make_maps(problem, problem.loss))
    assert verdict.spearman.mean == verdict.kendall == pytest.approx(1)
    assert verdict.spearman_equal_bits == pytest.approx(1)
    assert verdict.calibration.gain == pytest.approx(1 / 3)
    assert verdict.calibration.residual == pytest.approx(0, abs=1e-9)
    assert all(abs(r) < 1e-9 for r in verdict.residual_by_bits.values())


def test_null_arms_lose_against_the_truth():
    """At equal size, where the number of bits says nothing."""
    problem = make_problem()
    maps = make_maps(problem, problem.loss, noise=0.1)
    bits_alone = 4.0 ** -SIZES[None] * problem.costs["weight_bytes"][:, :1]
    arms = null_arms(problem.loss, maps, problem.offered, bits_alone)
    assert set(arms) == {"shuffled", "inverse", "bits alone"}
    best = judge(problem.loss, maps).spearman_equal_bits
    assert best > 0.9
    assert max(arms.values()) < best - 0.2


def test_equal_size_is_harder_than_all_sizes():
    """A table that knows only the number of bits ranks sizes, and nothing within one."""
    problem = make_problem()
    maps = make_maps(problem, problem.loss)
    numel = problem.costs["weight_bytes"][:, :1] / SIZES[0]
    verdict = judge(4.0 ** -SIZES[None] * numel, maps)
    assert verdict.spearman.mean > 0.7
    assert verdict.spearman_equal_bits < verdict.spearman.mean - 0.05


def test_flips_below_the_noise_are_left_out():
    problem = make_problem()
    mixed = make_maps(problem, problem.loss)
    table = np.column_stack([problem.loss, np.zeros(UNITS)])  # the last column: not flipped
    flips = np.full((UNITS, UNITS), len(SIZES))
    np.fill_diagonal(flips, 0)
    kl = problem.loss[:, 0].copy()
    kl[: UNITS // 2] = 1e-9 * np.random.default_rng(0).random(UNITS // 2)  # noise only
    maps = Maps(
        np.concatenate([mixed.choices, flips]),
        np.concatenate([mixed.kl, kl]),
        np.concatenate([mixed.bits, np.full(UNITS, np.nan)]),
        [*mixed.groups, *[FLIPS] * UNITS],
    )
    assert judge(table, maps, floor=1e-8).flips.mean == pytest.approx(1)
    assert judge(table, maps).flips.mean < 0.9


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 60), st.floats(0, 3), st.integers(0, 99))
def test_intervals_hold_their_estimate(count, noise, seed):
    generator = np.random.default_rng(seed)
    first = generator.normal(size=count)
    second = first + noise * generator.normal(size=count)
    found = rank_interval(first, second)
    assert found.mean == pytest.approx(spearmanr(first, second).statistic)
    assert -1 <= found.low <= found.high <= 1
    if count > 20:
        assert found.low - 1e-9 <= found.mean <= found.high + 1e-9


def test_constant_predictions_have_no_rank():
    assert np.isnan(rank_interval(np.ones(9), np.arange(9.0)).mean)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(0, 60))
def test_walks_keep_the_size_to_the_byte(seed, column, steps):
    problem = make_problem()
    start = uniform(problem, column)
    generator = np.random.default_rng(seed)
    found = random_walk(problem, "weight_bytes", start, steps, generator)
    cost = problem.total_cost
    assert cost(found, "weight_bytes") == cost(start, "weight_bytes")
    if 0 < column < 4 and steps > 5:
        assert (found != start).any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(2.5, 6))
def test_random_maps_meet_a_reachable_size_exactly(seed, bits):
    problem = make_problem()
    generator = np.random.default_rng(seed)
    target = int(bits * problem.costs["weight_bytes"][:, 0].sum() / SIZES[0]) // 64 * 64
    found = random_exactly(problem, "weight_bytes", target, generator)
    assert problem.total_cost(found, "weight_bytes") == target
