"""Two scores against their definitions that `test_estimators.py` only sums up or bounds."""

import pytest
import torch

from evaluation.assembly import AssembledModel
from sensitivity import menu
from sensitivity.base import lossy
from sensitivity.hessian_trace import MOST_CHUNKS, PROBES, _traces
from tests.conftest import choices_of
from tests.sensitivity.test_estimators import CHUNKS, CPU, inside, unshrunk, whole


def test_hessian_trace_is_half_the_mean_curvature_times_the_squared_error(make_bank):
    """1/2 Tr(H_u) / n_u ||dW_u||^2 a token; the trace itself has a test of its own."""
    model = AssembledModel(make_bank("llama"), CPU)
    layout = model.bank.layout
    choices = choices_of(layout)
    found = whole("hessian-trace", model, choices).mean()
    sites = inside(layout)
    used = CHUNKS[:MOST_CHUNKS]
    traces = dict.fromkeys((site.parameter for site in sites), 0.0)
    for c, ids in enumerate(used):
        for probe in range(PROBES):
            for name, value in _traces(model, sites, ids, 1000 * c + probe).items():
                traces[name] += value / PROBES / used.size
    for u, unit in enumerate(layout.units):
        for scheme in choices[u] if unit.layer is not None else []:
            errors = [
                model.bank.tensors(unit, scheme)[s.parameter] - model.parameter(s.parameter)
                for s in unit.sites
            ]
            squared = sum(float(error.double().square().sum()) for error in errors)
            numel = sum(error.numel() for error in errors)
            trace = sum(traces[site.parameter] for site in unit.sites)
            expected = 0.5 * trace / numel * squared
            assert found[u, menu(choices).index(scheme)] == pytest.approx(expected, rel=1e-4)


def test_output_error_of_packed_experts_sums_over_the_tokens_routed_to_each(make_bank):
    """Mixtral's experts computed by hand, with the routing that its own router chose."""
    model = AssembledModel(make_bank("mixtral"), CPU)
    layout = model.bank.layout
    choices = choices_of(layout)
    table = whole("output-error", model, choices)
    sums = unshrunk(table)
    model.assign(None)
    units = [u for u, unit in enumerate(layout.units) if unit.kind == "experts"]
    assert units
    for u in units:
        unit = layout.units[u]
        names = {site.parameter.rsplit(".", 1)[1]: site.parameter for site in unit.stored}
        experts = model.module.get_submodule(names["down_proj"].rsplit(".", 1)[0])
        caught = []
        handle = experts.register_forward_pre_hook(lambda _, given: caught.append(given))  # noqa: B023
        with torch.inference_mode():
            for ids in CHUNKS:
                model.module(torch.from_numpy(ids)[None])
        handle.remove()
        for scheme in lossy(choices[u]):
            errors = {
                name: model.bank.tensors(unit, scheme)[p] - model.parameter(p)
                for name, p in names.items()
            }
            expected = 0.0
            for x, routed, _ in caught:
                x = x.reshape(-1, x.shape[-1])
                for e in range(len(experts.down_proj)):
                    mine = x[(routed == e).any(-1)]
                    gate, up = (mine @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
                    inner = torch.nn.functional.silu(gate) * up
                    for inputs, error in (
                        (mine, errors["gate_up_proj"][e]), (inner, errors["down_proj"][e])
                    ):  # fmt: skip
                        expected += float((inputs @ error.T).double().square().sum())
            column = menu(choices).index(scheme)
            assert sums[u, column] == pytest.approx(expected, rel=1e-4)
