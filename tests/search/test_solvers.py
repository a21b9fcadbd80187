"""Solvers: exact against enumeration, certified, never worse than greedy."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import highs
from search.controls import random_at, uniform
from search.dynamic import solve_dynamic
from search.errors import InfeasibleBudgetError, SearchError
from search.exact import solve, solve_plain, sweep
from search.greedy import solve_greedy, solve_greedy_several
from search.lagrangian import hull_steps, relax
from search.problem import FewFormats, Problem, changed
from search.relaxation import multipliers


@st.composite
def problems(draw, most_units=6, most_schemes=4):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    units, schemes = draw(st.integers(1, most_units)), draw(st.integers(1, most_schemes))
    offered = rng.random((units, schemes)) < 0.8
    offered[np.arange(units), rng.integers(0, schemes, units)] = True
    loss = rng.lognormal(0, 2, (units, schemes))
    costs = {name: rng.integers(0, 40, (units, schemes)) for name in ("bytes", "time")}
    return Problem(loss, costs, offered)


def enumerate_best(problem, limits):
    best = None
    for choice in product(*(np.flatnonzero(row) for row in problem.offered)):
        choice = np.array(choice)
        few = problem.few
        formats = {f for f in few.of[choice] if f >= 0} if few else set()
        if few and len(formats) > few.most:
            continue
        if all(problem.total_cost(choice, r) <= limit for r, limit in limits.items()):
            loss = problem.total_loss(choice)
            best = loss if best is None else min(best, loss)
    return best


@settings(deadline=None, max_examples=150)
@given(problems(), st.floats(0, 1.1))
def test_the_solver_finds_the_optimum(problem, position):
    low = problem.smallest("bytes")
    high = int(np.where(problem.offered, problem.costs["bytes"], 0).max(axis=1).sum())
    limits = {"bytes": int(low + position * (high - low))}
    solution = solve(problem, limits)
    best = enumerate_best(problem, limits)
    assert solution.loss == pytest.approx(best, rel=1e-9)
    assert solution.bound <= best * (1 + 1e-9)
    assert solution.gap < 1e-6
    assert solution.costs["bytes"] <= limits["bytes"]


@settings(deadline=None, max_examples=60)
@given(problems(), st.integers(0, 200), st.integers(0, 200))
def test_two_budgets_at_once(problem, first, second):
    limits = {"bytes": first, "time": second}
    best = enumerate_best(problem, limits)
    if best is None:
        with pytest.raises(InfeasibleBudgetError):
            solve(problem, limits)
    else:
        assert solve(problem, limits).loss == pytest.approx(best, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(problems(most_units=40, most_schemes=8), st.floats(0, 1))
def test_exact_is_never_worse_than_greedy_and_bounds_hold(problem, position):
    low = problem.smallest("bytes")
    high = int(np.where(problem.offered, problem.costs["bytes"], 0).max(axis=1).sum())
    limit = int(low + position * (high - low))
    greedy = solve_greedy(problem, "bytes", limit)
    exact = solve(problem, {"bytes": limit})
    relaxed = relax(problem, "bytes", limit, hull_steps(problem, "bytes"))
    assert exact.loss <= greedy.loss * (1 + 1e-12)
    assert relaxed.bound <= exact.loss * (1 + 1e-9)
    assert problem.total_cost(relaxed.choice, "bytes") <= limit


@settings(deadline=None, max_examples=60)
@given(problems(most_units=30, most_schemes=6), st.floats(0, 1))
def test_dynamic_programming_and_plain_highs_find_the_same_optimum(problem, position):
    low = problem.smallest("bytes")
    high = int(np.where(problem.offered, problem.costs["bytes"], 0).max(axis=1).sum())
    limit = int(low + position * (high - low))
    exact = solve(problem, {"bytes": limit})
    assert solve_dynamic(problem, "bytes", limit).loss == pytest.approx(exact.loss, rel=1e-9)
    assert solve_plain(problem, {"bytes": limit}).loss == pytest.approx(exact.loss, rel=1e-9)


@settings(deadline=None, max_examples=100)
@given(problems(), st.integers(0, 250), st.integers(1, 3), st.integers(0, 2**16))
def test_at_most_k_formats(problem, limit, most, seed):
    """Two columns may share a format, and one may not count."""
    of = np.random.default_rng(seed).integers(-1, 3, problem.loss.shape[1])
    problem = Problem(problem.loss, problem.costs, problem.offered, FewFormats(of, most))
    best = enumerate_best(problem, {"bytes": limit})
    if best is None:
        with pytest.raises(InfeasibleBudgetError):
            solve(problem, {"bytes": limit})
    else:
        solution = solve(problem, {"bytes": limit})
        assert solution.loss == pytest.approx(best, rel=1e-9)
        assert len(problem.few.used(solution.choice)) <= most


def test_a_minimum_of_units_is_left_alone():
    """As a limit on how many are changed, like any other resource."""
    rng = np.random.default_rng(0)
    offered = np.ones((20, 4), dtype=bool)
    loss = rng.lognormal(0, 1, (20, 1)) * [1, 0.1, 0.001, 0]  # four bits are nearly as good as 16
    cost = np.tile([2, 3, 4, 16], (20, 1))
    problem = Problem(loss, {"bits": cost, "changed": changed(offered, [3])}, offered)
    free = solve(problem, {"bits": 200})
    kept = solve(problem, {"bits": 200, "changed": 9})
    assert (kept.choice == 3).sum() >= 11
    assert (free.choice == 3).sum() < 11
    assert kept.loss >= free.loss
    with pytest.raises(InfeasibleBudgetError, match=r"changed could be \d+ with the others kept"):
        solve(problem, {"bits": 100, "changed": 10})


@settings(deadline=None, max_examples=40)
@given(problems(most_units=60, most_schemes=8), st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_several_budgets_are_certified_and_never_worse_than_greedy(problem, first, second):
    limits = {}
    for resource, position in (("bytes", first), ("time", second)):
        low = problem.smallest(resource)
        high = int(np.where(problem.offered, problem.costs[resource], 0).max(axis=1).sum())
        limits[resource] = int(low + position * (high - low))
    try:
        exact = solve(problem, limits)
    except InfeasibleBudgetError as error:
        assert solve_greedy_several(problem, limits) is None
        assert error.smallest
        assert error.units
        return
    greedy = solve_greedy_several(problem, limits)
    assert greedy is None or exact.loss <= greedy.loss
    assert exact.gap < 1e-6
    assert multipliers(problem, limits).bound <= exact.loss * (1 + 1e-9) + 1e-12
    assert problem.breaks(exact.choice, limits) is None


def test_budgets_that_fit_alone_and_not_together_say_what_could_be():
    """One unit small, the other fast: bytes and time pull apart."""
    costs = {"bytes": np.array([[1, 9], [1, 9]]), "time": np.array([[9, 1], [9, 1]])}
    problem = Problem(np.ones((2, 2)), costs, np.ones((2, 2), bool), names=("q", "down"))
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(problem, {"bytes": 9, "time": 12})
    assert caught.value.smallest == {"bytes": 10, "time": 18}
    text = str(caught.value)
    assert text.startswith("no map meets bytes <= 9 and time <= 12 together: bytes could be 10")
    assert "q at least 1" in text


def test_a_sweep_solves_each_budget_and_losses_fall():
    rng = np.random.default_rng(0)
    loss = np.sort(rng.lognormal(0, 2, (60, 6)), axis=1)[:, ::-1]
    cost = np.sort(rng.integers(100, 10_000, (60, 6)), axis=1)
    problem = Problem(loss, {"bytes": cost}, np.ones((60, 6), dtype=bool))
    budgets = np.linspace(cost[:, 0].sum(), cost[:, -1].sum(), 15).astype(int)
    solutions = sweep(problem, "bytes", budgets)
    losses = [solution.loss for solution in solutions]
    assert losses == sorted(losses, reverse=True)
    for budget, solution in zip(budgets, solutions, strict=True):
        assert solution.loss == pytest.approx(solve(problem, {"bytes": int(budget)}).loss)


def test_an_impossible_budget_names_the_smallest():
    problem = Problem(np.ones((2, 1)), {"bytes": np.array([[10], [20]])}, np.ones((2, 1), bool))
    with pytest.raises(InfeasibleBudgetError, match="bytes <= 29; the smallest possible is 30"):
        solve(problem, {"bytes": 29})
    assert solve(problem, {"bytes": 30}).loss == 2


@settings(deadline=None, max_examples=60)
@given(problems(most_units=30), st.floats(0, 1), st.integers(0, 1000))
def test_random_controls_fit_and_use_their_bytes(problem, position, seed):
    """Nothing dearer fits any more: the control isn't handicapped by unused bytes."""
    low = problem.smallest("bytes")
    high = int(np.where(problem.offered, problem.costs["bytes"], 0).max(axis=1).sum())
    limit = int(low + position * (high - low))
    choice = random_at(problem, "bytes", limit, np.random.default_rng(seed))
    used = problem.total_cost(choice, "bytes")
    assert problem.offered[np.arange(len(choice)), choice].all()
    assert used <= limit
    extra = problem.costs["bytes"] - problem.costs["bytes"][np.arange(len(choice)), choice][:, None]
    assert not (problem.offered & (extra > 0) & (extra <= limit - used)).any()


def test_uniform_maps_respect_pins_and_gaps():
    offered = np.array([[True, False, False], [False, True, True], [False, True, False]])
    problem = Problem(np.zeros((3, 3)), {}, offered)
    assert uniform(problem, 1).tolist() == [0, 1, 1]
    assert uniform(problem, 2).tolist() == [0, 2, 1]
    assert uniform(problem, 0) is None


def test_problems_are_checked():
    with pytest.raises(ValueError, match="offered no scheme"):
        Problem(np.zeros((1, 1)), {}, np.zeros((1, 1), dtype=bool))
    with pytest.raises(ValueError, match="no finite loss"):
        Problem(np.full((1, 1), np.nan), {}, np.ones((1, 1), dtype=bool))


def test_tolerance_of_highs_is_no_proof(monkeypatch):
    """A solution that breaks a limit by tolerance, and nothing within the tightened one."""
    rng = np.random.default_rng(0)
    cost = rng.integers(1, 40, (6, 3))
    problem = Problem(rng.lognormal(0, 2, (6, 3)), {"bytes": cost}, np.ones((6, 3), bool))
    limit = {"bytes": int(cost.min(axis=1).sum()) + 1}
    answers = iter([problem.costs["bytes"].argmax(axis=1)])

    def program(problem, rooms, open_, free, *_):
        for choice in answers:
            return choice[free], 0.0
        raise highs.NothingFitsError("no assignment is within the limits")

    monkeypatch.setattr(highs, "_program", program)
    with pytest.raises(SearchError, match="tolerance") as caught:
        highs.minimise(problem, limit, problem.offered, 1e-9)
    assert not isinstance(caught.value, highs.NothingFitsError)
