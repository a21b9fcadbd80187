"""Fronts, intervals and calibrations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import stdtrit

from search.calibration import fit_gain
from search.front import hypervolume, non_dominated
from search.statistics import divergence_interval, mean_interval, paired_difference, t_975

values = arrays(float, st.integers(1, 12), elements=st.integers(0, 6).map(float))


@given(st.data())
def test_no_point_of_a_front_is_dominated_and_all_others_are(data):
    cost = data.draw(values)
    loss = data.draw(arrays(float, len(cost), elements=st.integers(0, 6).map(float)))
    keep = non_dominated(cost, loss)
    for i in range(len(cost)):
        dominated = any(
            cost[j] <= cost[i] and loss[j] <= loss[i] and (cost[j], loss[j]) != (cost[i], loss[i])
            for j in range(len(cost))
        )
        assert keep[i] == (not dominated)


def test_a_point_without_a_loss_is_on_no_front():
    assert non_dominated(np.array([1, 2]), np.array([np.nan, 3.0])).tolist() == [False, True]


@pytest.mark.parametrize("degrees", [*range(1, 40), 63, 100, 1000])
def test_student_quantiles(degrees):
    assert t_975(degrees) == pytest.approx(stdtrit(degrees, 0.975), abs=2e-4)


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    tokens = np.full(12, 255.0)
    covered = 0
    for _ in range(2000):
        found = mean_interval(tokens * rng.normal(0.3, 0.1, 12), tokens)
        covered += found.low <= 0.3 <= found.high
    assert 0.935 <= covered / 2000 <= 0.965


def test_pairing_cancels_what_is_hard_for_both():
    rng = np.random.default_rng(0)
    tokens = np.full(10, 100.0)
    hard = rng.normal(50, 20, 10)
    ours, theirs = hard + rng.normal(0, 0.1, 10), hard + 1
    difference = paired_difference(ours, theirs, tokens)
    assert difference.high < 0
    assert mean_interval(ours, tokens).high > mean_interval(theirs, tokens).low  # unpaired: no


def test_the_gain_is_recovered_and_noise_ignored():
    raw = np.array([0.001, 0.01, 0.1, 1.0, 10.0])
    fit = fit_gain(raw, 1.3 * raw)
    assert fit.gain == pytest.approx(1.3)
    assert fit.residual == pytest.approx(0, abs=1e-9)
    noisy = np.where(raw < 0.005, 0.0009, 1.3 * raw)
    assert fit_gain(raw, noisy, floor=0.001).gain == pytest.approx(1.3)
    assert fit_gain(np.zeros(2), np.zeros(2)).maps == 0


@given(st.data())
def test_the_hypervolume_counts_the_cells_that_a_front_dominates(data):
    """Whole numbers: unit squares with a point to their lower left."""
    cost = data.draw(values)
    loss = data.draw(arrays(float, len(cost), elements=st.integers(0, 6).map(float)))
    cells = sum(bool(((cost <= x) & (loss <= y)).any()) for x in range(5) for y in range(5))
    assert hypervolume(cost, loss, (5.0, 5.0)) == cells
    assert hypervolume(cost[:0], loss[:0], (5.0, 5.0)) == 0


def test_an_interval_of_divergences_never_begins_below_zero():
    tokens = np.full(3, 10.0)
    wide, known = np.array([0.1, 9.0, 0.2]), np.array([5.0, 5.1, 4.9])
    assert mean_interval(wide, tokens).low < 0 == divergence_interval(wide, tokens).low
    assert divergence_interval(known, tokens) == mean_interval(known, tokens)
    rounded = divergence_interval(np.array([-1e-9, 1e-10, 0.0]), tokens)
    assert rounded.low <= rounded.mean <= rounded.high
    assert np.isnan(divergence_interval(wide[:1], tokens[:1]).low)
