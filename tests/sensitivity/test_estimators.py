"""Estimators against their definitions, on models small enough to compute them directly."""

import numpy as np
import pytest
import torch

from evaluation.assembly import AssembledModel
from evaluation.calibration import backward_of_samples
from sensitivity import ESTIMATORS, Share, menu, merge
from tests.conftest import choices_of

CPU = torch.device("cpu")
CHUNKS = np.random.default_rng(1).integers(2, 300, (4, 24))


def whole(name, model, choices):
    estimator = ESTIMATORS[name]
    shares = estimator.shares(len(choices), len(CHUNKS))
    return merge(estimator.score(model, CHUNKS, choices, share) for share in shares)


@pytest.fixture(params=["llama", "mixtral", "gpt_oss"])
def model(request, make_bank):
    return AssembledModel(make_bank(request.param), CPU)


def test_output_error_is_the_squared_change_of_the_outputs(make_bank):
    """E || x dW^T ||^2 with x caught by an ordinary hook."""
    model = AssembledModel(make_bank("llama"), CPU)
    layout, choices = model.bank.layout, choices_of(model.bank.layout)
    found = whole("output-error", model, choices).mean()
    for u, unit in enumerate(layout.units):
        for scheme in choices[u] if unit.layer is not None else []:
            expected = 0.0
            for site in unit.sites:
                inputs = []
                module = model.module.get_submodule(site.name)
                handle = module.register_forward_pre_hook(lambda _, a: inputs.append(a[0]))  # noqa: B023
                with torch.inference_mode():
                    for ids in CHUNKS:
                        model.module(torch.from_numpy(ids)[None])
                handle.remove()
                dw = model.bank.tensors(unit, scheme)[site.parameter] - module.weight
                expected += sum((x @ dw.T).double().square().sum().item() for x in inputs)
            column = menu(choices).index(scheme)
            assert found[u, column] == pytest.approx(expected / CHUNKS.size, rel=1e-4)


def test_output_error_reaches_packed_experts(model):
    """The sum over an experts unit equals the outputs' change, token by routed token."""
    choices = choices_of(model.bank.layout)
    table = whole("output-error", model, choices)
    kinds = [unit.kind for unit in model.bank.layout.units]
    for u, kind in enumerate(kinds):
        offered = ~np.isnan(table.sums[u])
        if kind in ("linear", "experts"):
            assert (table.sums[u][offered] > 0).all()


def test_fisher_is_half_the_squared_gradient_times_the_squared_error(model):
    layout, choices = model.bank.layout, choices_of(model.bank.layout)
    found = whole("fisher", model, choices)
    names = {
        site.parameter for unit in layout.units for site in unit.sites if unit.layer is not None
    }
    for name in names:
        model.parameter(name).requires_grad_(True)
    expected = np.zeros_like(found.sums)
    for i, ids in enumerate(CHUNKS):
        backward_of_samples(model.module, ids, seed=i)
        for u, unit in enumerate(layout.units):
            for scheme in choices[u] if unit.layer is not None else []:
                for site in unit.stored:
                    parameter = model.parameter(site.parameter)
                    dw = model.bank.tensors(unit, scheme)[site.parameter] - parameter.data
                    score = 0.5 * (parameter.grad.double() ** 2 * dw.double() ** 2).sum()
                    expected[u, menu(choices).index(scheme)] += score.item()
        for name in names:
            model.parameter(name).grad = None
    for name in names:
        model.parameter(name).requires_grad_(False)
    offered = ~np.isnan(found.sums)
    assert found.sums[offered] == pytest.approx(expected[offered], rel=1e-4)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_shares_add_up_to_the_whole(make_bank, name):
    model = AssembledModel(make_bank("llama"), CPU)
    choices = choices_of(model.bank.layout)
    units, chunks = len(choices), len(CHUNKS)
    in_one = ESTIMATORS[name].score(model, CHUNKS, choices, Share((0, units), (0, chunks)))
    in_shares = whole(name, model, choices)
    assert in_shares.tokens == pytest.approx(in_one.tokens)
    assert in_shares.sums == pytest.approx(in_one.sums, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_scores_fall_with_bits_and_leave_the_model_as_it_was(make_bank, name):
    model = AssembledModel(make_bank("llama"), CPU)
    choices = choices_of(model.bank.layout)
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    table = whole(name, model, choices).mean()
    rows = table[[u.layer is not None for u in model.bank.layout.units]][:, 1:]
    assert (np.diff(rows, axis=1) < 0).all()
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    assert not any(p.requires_grad for p in model.module.parameters())
    assert all(p.grad is None for p in model.module.parameters())


def test_fisher_predicts_the_loss_of_small_perturbations(make_bank):
    """At 8 bits the second order is nearly all: predicted KL is measured KL, within sampling."""
    from evaluation.evaluator import Evaluator
    from quantization.schemes import Scheme

    evaluator = Evaluator(make_bank("llama"), CPU)
    layout = evaluator.bank.layout
    choices = choices_of(layout)
    table = whole("fisher", evaluator.model, choices).mean()
    column = menu(choices).index(Scheme("int8-channel"))
    predicted = np.nansum(table[:, column])
    schemes = [row[-1] for row in choices]
    losses = [evaluator.measure(schemes, ids) for ids in CHUNKS]
    measured = sum(loss.kl_sum for loss in losses) / sum(loss.tokens for loss in losses)
    assert 0.3 < predicted / measured < 3
