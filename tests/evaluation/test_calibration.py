"""Calibration against plain hooks and plain autograd."""

import numpy as np
import pytest
import torch

from evaluation import calibration
from evaluation.calibration import backward_of_samples, calibrating, passes
from quantization import statistics
from quantization.checkpoints import load_model
from quantization.statistics import Statistics, output_blocks

CPU = torch.device("cpu")
CHUNKS = np.random.default_rng(1).integers(2, 300, (3, 24))


def sites(bank):
    return [s for u in bank.layout.units if u.layer is not None for s in u.stored]


def collected(bank, name, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("BITFRONT_CACHE", str(tmp_path))
    statistics = Statistics(name)
    wanted = {kind: sites(bank)}
    steps = calibrating(bank.checkpoint, wanted, CHUNKS, statistics, CPU, torch.float32)
    assert len(list(steps)) == passes(wanted, CHUNKS)
    return {site: statistics.of(site, [kind]) for site in sites(bank)}


@pytest.mark.parametrize("part_bytes", [2**30, 1])
def test_second_moments_are_those_of_the_inputs(make_bank, tmp_path, monkeypatch, part_bytes):
    """Whether they fit into one pass or take one a site."""
    monkeypatch.setattr(calibration, "PART_BYTES", part_bytes)
    bank = make_bank("llama")
    found = collected(bank, "moments", "second-moment", tmp_path, monkeypatch)
    model = load_model(bank.checkpoint, torch.float32)
    for site in sites(bank):
        inputs = []
        module = model.get_submodule(site.name)
        handle = module.register_forward_pre_hook(lambda _, a: inputs.append(a[0][0]))  # noqa: B023
        with torch.inference_mode():
            for ids in CHUNKS:
                model(torch.from_numpy(ids)[None])
        handle.remove()
        x = torch.cat(inputs)
        assert torch.allclose(found[site].second_moment, x.T @ x / len(x), rtol=1e-3, atol=1e-6)
        assert torch.equal(found[site].importance, found[site].second_moment.diagonal())


def test_sites_that_read_the_same_tensor_share_a_file(make_bank, tmp_path, monkeypatch):
    bank = make_bank("llama")
    collected(bank, "shared", "second-moment", tmp_path, monkeypatch)
    paths = [Statistics("shared").path(site, "second-moment") for site in sites(bank)]
    assert len({path.stat().st_ino for path in paths}) == 4 / 7 * len(
        paths
    )  # qkv, o, gate up, down


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_each_expert_has_a_moment_of_the_tokens_that_reached_it(
    make_bank, tmp_path, monkeypatch, family
):
    found = collected(make_bank(family), family, "second-moment", tmp_path, monkeypatch)
    experts = [site for site in found if len(site.shape) == 3]
    assert experts
    for site in experts:
        moment = found[site].second_moment
        assert moment.shape == (site.shape[0], site.shape[-1], site.shape[-1])
        assert not torch.allclose(moment[0], moment[1])


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_fisher_is_the_mean_squared_gradient_of_samples(make_bank, tmp_path, monkeypatch, family):
    bank = make_bank(family)
    found = collected(bank, family, "fisher", tmp_path, monkeypatch)
    model = load_model(bank.checkpoint, torch.float32)
    parameters = dict(model.named_parameters())
    sums = {site: torch.zeros(site.shape) for site in found}
    for seed, ids in enumerate(CHUNKS):
        model.zero_grad()
        backward_of_samples(model, ids, seed)
        for site, total in sums.items():
            gradient = parameters[site.parameter].grad
            total += (gradient.mT if site.transposed else gradient).square()
    for site, total in sums.items():
        assert torch.allclose(found[site].fisher, total / CHUNKS.size, rtol=1e-4)


@pytest.mark.parametrize("most", [1024, 40])
def test_curvature_is_that_of_inputs_and_of_gradients_by_outputs(
    make_bank, tmp_path, monkeypatch, most
):
    """Whole, and in blocks of rows of which the last is short."""
    monkeypatch.setattr(statistics, "OUTPUTS", most)
    bank = make_bank("llama")
    found = collected(bank, "curvature", "curvature", tmp_path, monkeypatch)
    model = load_model(bank.checkpoint, torch.float32)
    modules = {site: model.get_submodule(site.name) for site in found}
    seen = {site: ([], []) for site in found}
    for site, module in modules.items():
        xs, gs = seen[site]
        module.register_forward_pre_hook(lambda _, a, xs=xs: xs.append(a[0][0].detach()))
        module.register_full_backward_hook(lambda _m, _i, g, gs=gs: gs.append(g[0][0]))
    for seed, ids in enumerate(CHUNKS):
        backward_of_samples(model, ids, seed)
    for site, (xs, gs) in seen.items():
        x, g = torch.cat(xs), torch.cat(gs)
        inputs = (x * g.square().mean(1, keepdim=True)).T @ x / len(x)
        outputs = g.T @ g / len(g)
        own = found[site]
        assert torch.allclose(own.input_curvature, inputs, rtol=1e-3, atol=1e-4 * inputs.max())
        for k, block in enumerate(own.output_curvature):
            part = slice(k * len(block), (k + 1) * len(block))
            expected = outputs[part, part]
            size = len(expected)
            close = torch.allclose(
                block[:size, :size], expected, rtol=1e-3, atol=1e-4 * expected.max()
            )
            assert close
            assert not block[size:].any()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_curvature_of_experts_and_transposed_weights_has_the_shape_of_the_site(
    make_bank, tmp_path, monkeypatch, family
):
    found = collected(make_bank(family), family, "curvature", tmp_path, monkeypatch)
    for site, own in found.items():
        *experts, rows, columns = site.shape
        blocks, height = output_blocks(rows)
        assert own.input_curvature.shape == (*experts, columns, columns)
        assert own.output_curvature.shape == (*experts, blocks, height, height)
        assert own.input_curvature.any()
        assert own.output_curvature.any()
        if experts:
            assert not torch.allclose(own.output_curvature[0], own.output_curvature[1])
