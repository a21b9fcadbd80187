"""Interactions: against enumeration, and never worse than the additive optimum."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.errors import SearchError
from search.exact import solve
from search.problem import FewFormats, Problem
from search.quadratic import Quadratic, solve_quadratic


def instance(seed, units=5, schemes=3, strength=0.5, few=None):
    rng = np.random.default_rng(seed)
    loss = rng.lognormal(0, 1, (units, schemes))
    cost = rng.integers(1, 30, (units, schemes))
    pairs = strength * rng.standard_normal((units * schemes,) * 2)
    pairs = (pairs + pairs.T) * (rng.random(pairs.shape) < 0.6)
    pairs = np.triu(pairs) + np.triu(pairs).T
    blocks = pairs.reshape(units, schemes, units, schemes)
    blocks[np.arange(units), :, np.arange(units)] = 0
    problem = Problem(loss, {"bytes": cost}, np.ones(loss.shape, bool), few)
    low, high = cost.min(1).sum(), cost.max(1).sum()
    return Quadratic(problem, pairs), {"bytes": int(low + 0.5 * (high - low))}


def by_hand(quadratic, choice):
    schemes = quadratic.problem.loss.shape[1]
    at = [u * schemes + s for u, s in enumerate(choice)]
    total = sum(quadratic.problem.loss.ravel()[e] for e in at)
    return total + sum(quadratic.pairs[a, b] for i, a in enumerate(at) for b in at[:i])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32))
def test_small_instances_are_solved_to_their_optimum(seed):
    quadratic, limits = instance(seed)
    problem = quadratic.problem
    found = solve_quadratic(quadratic, limits)
    best = min(
        by_hand(quadratic, choice)
        for choice in map(np.array, product(range(3), repeat=5))
        if problem.breaks(choice, limits) is None
    )
    assert found.loss == pytest.approx(by_hand(quadratic, found.choice))
    assert found.loss == pytest.approx(best, abs=1e-5)
    assert found.bound <= best + 1e-5


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32))
def test_it_is_never_worse_than_what_ignores_interactions(seed):
    """Also in no time at all, where the local search is on its own."""
    quadratic, limits = instance(seed, units=25, schemes=4, strength=0.2)
    found = solve_quadratic(quadratic, limits, seconds=1.0)
    additive = solve(quadratic.problem, limits)
    assert found.loss <= quadratic.total_loss(additive.choice) + 1e-12
    assert found.bound <= found.loss
    assert quadratic.problem.breaks(found.choice, limits) is None


def test_without_interactions_it_is_the_additive_optimum():
    quadratic, limits = instance(0, strength=0.0)
    assert solve_quadratic(quadratic, limits).loss == solve(quadratic.problem, limits).loss


def test_a_cap_on_formats_holds():
    quadratic, limits = instance(1, few=FewFormats(np.arange(3), 2))
    found = solve_quadratic(quadratic, limits)
    assert len(set(found.choice.tolist())) <= 2


def test_what_makes_no_sense_is_refused():
    quadratic, _ = instance(0)
    with pytest.raises(ValueError, match="symmetric"):
        Quadratic(quadratic.problem, np.triu(np.ones((15, 15)), 1))
    with pytest.raises(ValueError, match="no pair with itself"):
        Quadratic(quadratic.problem, np.ones((15, 15)))
    large = Problem(np.ones((1000, 4)), {}, np.ones((1000, 4), bool))
    with pytest.raises(SearchError, match="4,000 entries are too many"):
        Quadratic(large, np.zeros((1, 1)))
