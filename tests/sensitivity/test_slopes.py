"""Slopes against finite differences of the measured loss, and against one graph of the model."""

import numpy as np
import pytest
import torch

from evaluation.evaluator import Evaluator
from quantization.schemes import Scheme
from sensitivity.base import menu
from sensitivity.slopes import measure_slopes
from tests.conftest import choices_of

CPU = torch.device("cpu")
IDS = np.random.default_rng(0).integers(0, 64, 24)


@pytest.fixture(params=["llama", "mixtral", "gemma2"])  # the last with a head that is capped
def evaluator(make_bank, request):
    return Evaluator(make_bank(request.param), CPU)


def test_slopes_are_the_change_of_the_measured_loss_to_first_order(evaluator):
    """A hundredth of the way from a unit's scheme to another one, measured both ways."""
    choices = choices_of(evaluator.bank.layout)
    columns = menu(choices)
    schemes = [row[0] for row in choices]
    found = measure_slopes(evaluator, schemes, IDS, choices)
    measured = evaluator.measure(schemes, IDS)
    assert found.loss.kl_sum == pytest.approx(measured.kl_sum, rel=1e-5)
    assert found.loss.tokens == measured.tokens
    units = evaluator.bank.layout.units
    step, checked = 0.01, 0
    for u, unit in enumerate(units):
        for scheme in choices[u][1:]:
            change = 0.0
            for sign in (1, -1):
                evaluator.model.assign(schemes)
                for site in unit.stored:
                    here = evaluator.bank.tensors(unit, schemes[u])[site.parameter]
                    there = evaluator.bank.tensors(unit, scheme)[site.parameter]
                    moved = here + sign * step * (there - here)
                    evaluator.model.parameter(site.parameter).data = moved
                q_TH = evaluator.hidden(evaluator.model.module, IDS)
                change += sign * evaluator.loss(evaluator.reference(IDS), q_TH, IDS).kl_sum
                evaluator.model.reload([u], schemes)
            slope = found.sums[u, columns.index(scheme)] - found.sums[u, columns.index(schemes[u])]
            assert slope == pytest.approx(change / (2 * step), rel=0.02, abs=2e-3)
            checked += abs(slope) > 0.02
    assert checked > 3


def test_at_the_unquantized_model_nothing_slopes(evaluator):
    choices = [[Scheme("bf16"), *row] for row in choices_of(evaluator.bank.layout)]
    found = measure_slopes(evaluator, [None] * len(choices), IDS, choices)
    assert found.loss.kl_sum == pytest.approx(0, abs=1e-6)
    assert np.nanmax(np.abs(found.sums)) < 1e-4
