"""Calibration against plain hooks and plain autograd."""

import numpy as np
import pytest
import torch

from evaluation import calibration
from evaluation.calibration import backward_of_samples, calibrate
from quantization.checkpoints import load_model
from quantization.statistics import Statistics

CPU = torch.device("cpu")
CHUNKS = np.random.default_rng(1).integers(2, 300, (3, 24))


def sites(bank):
    return [s for u in bank.layout.units if u.layer is not None for s in u.stored]


def collected(bank, name, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("BITFRONT_CACHE", str(tmp_path))
    statistics = Statistics(name)
    wanted = {kind: sites(bank)}
    calibrate(bank.checkpoint, wanted, CHUNKS, statistics, CPU, torch.float32)
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
