"""Transforms: folds leave the model as it is, and quantization better than it was."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from evaluation.arithmetic import default_device
from evaluation.calibration import calibrating
from quantization.adapter import describe
from quantization.checkpoints import load_model, resolve
from quantization.errors import ModelError
from quantization.formats import FORMATS
from quantization.statistics import Statistics
from quantization.transforms import TRANSFORMS, checkpoint, finding
from quantization.transforms.awq import fold_error
from quantization.transforms.checkpoint import Folding, folded_sites, write_folded
from quantization.transforms.finding import find_folds, sample_ids
from tests.conftest import save_tiny

FORMAT = "int4-g32"
FOUND = {  # what each layer has, by the producer's last name
    "llama": {"input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"},
    "qwen3": {"input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"},
    "gemma2": {"input_layernorm", "v_proj", "pre_feedforward_layernorm", "up_proj"},
    "gpt_neox": {"input_layernorm", "post_attention_layernorm"},  # GELU lies behind the up proj.
    "mixtral": {"input_layernorm", "v_proj", "post_attention_layernorm", "gate_up_proj"},
    "gpt_oss": {"input_layernorm", "v_proj", "post_attention_layernorm"},  # its experts clamp
    "cohere": {"input_layernorm", "v_proj", "up_proj"},  # attention and MLP behind one norm
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints whose norms (and biases) have outlier channels."""

    def make(family: str, **more):
        path = save_tiny(family, tmp_path_factory.mktemp(family), **more)
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
                if name.endswith("layernorm.weight"):
                    parameter[::16] *= 12
        model.save_pretrained(path)
        return path

    return make


def calibrated(folder):
    """A checkpoint, its layout and its statistics."""
    original = resolve(str(folder))
    layout, statistics = describe(original), Statistics(f"outliers|{original.weights_hash}")
    ids = np.random.default_rng(0).integers(2, 300, (4, 64))
    wanted = {"second-moment": folded_sites(layout)}
    list(calibrating(original, wanted, ids, statistics, default_device(), torch.float32))
    return original, layout, statistics


@pytest.fixture(scope="module")
def outliers(folder):
    """A Llama with outlier channels."""
    return calibrated(folder("llama"))


def logits(model):
    with torch.no_grad():
        return model(input_ids=sample_ids(model), use_cache=False).logits


@pytest.mark.parametrize("family", FOUND)
def test_every_fold_leaves_the_logits_as_they_were(family, folder):
    original = resolve(str(folder(family)))
    model = load_model(original, torch.float32)
    before = logits(model)
    folds = find_folds(model, describe(original))
    assert torch.equal(logits(model), before)  # the search puts everything back
    names = [fold.name.partition(" > ")[0] for fold in folds]
    layers = [{n.rpartition(".")[2] for n in names if f".{i}." in n} for i in range(2)]
    assert layers == [FOUND[family]] * 2
    parameters = {name: p.data for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    for fold in folds:
        experts = fold.sites[0].shape[:1] if fold.experts else ()
        scale = torch.rand(*experts, fold.channels, generator=generator) * 3 + 0.3
        weight = parameters[fold.readers[0].parameter].clone()
        fold.apply(parameters, scale)
        assert not torch.allclose(parameters[fold.readers[0].parameter], weight)
        assert (logits(model) - before).norm() < 1e-4 * before.norm(), fold.name


def test_what_something_else_reads_is_no_fold(folder):
    """A norm whose output is also a residual, and an up projection behind a nonlinearity."""
    original = resolve(str(folder("llama")))
    model = load_model(original, torch.float32)
    layer = model.model.layers[0]
    layer.post_attention_layernorm.register_forward_hook(
        lambda m, args, out: setattr(layer, "n", out)
    )
    layer.mlp.register_forward_hook(lambda m, args, out: out + layer.n)
    layer.mlp.up_proj.register_forward_hook(lambda m, args, out: out.tanh())
    names = {fold.name.partition(" > ")[0] for fold in find_folds(model, describe(original))}
    assert not any(name.startswith("model.layers.0.mlp") for name in names)
    assert "model.layers.0.post_attention_layernorm" not in names
    assert "model.layers.1.post_attention_layernorm" in names
    assert "model.layers.1.mlp.up_proj" in names


def test_shared_heads_share_their_scales(outliers):
    """Two query heads of width 16 read each value head: inputs h and h + 16 are one channel."""
    original, layout, _ = outliers
    folds = find_folds(load_model(original, torch.float32), layout)
    fold = next(fold for fold in folds if "v_proj >" in fold.name)
    columns = fold.columns(torch.arange(32.0))
    assert columns.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]
    assert torch.equal(fold.pooled(columns), torch.arange(32.0).expand(2, 32))


@pytest.mark.parametrize(("format", "share"), [(FORMAT, 0.8), ("atom-int3-g64@6%", 0.97)])
def test_awq_errs_less_than_round_to_nearest(format, share, outliers):
    """Atom keeps the columns of loud inputs in eight bits, which leaves AWQ little to do."""
    original, layout, statistics = outliers
    model = load_model(original, torch.float32)
    parameters = dict(model.named_parameters())
    totals = np.zeros(2)
    for fold in find_folds(model, layout):
        weights = [parameters[site.parameter].data for site in fold.sites]
        known = [statistics.of(site, ["second-moment"]) for site in fold.sites]
        scale = TRANSFORMS["awq"].scale(fold, weights, known, FORMATS[format])
        ones = torch.ones(fold.channels)
        totals += [fold_error(fold, s, weights, known, FORMATS[format]) for s in (scale, ones)]
    assert totals[0] < share * totals[1]


def test_smoothquant_is_its_equation(outliers):
    original, layout, statistics = outliers
    model = load_model(original, torch.float32)
    fold = find_folds(model, layout)[0]
    weights = [dict(model.named_parameters())[site.parameter].data for site in fold.sites]
    known = [statistics.of(site, ["second-moment"]) for site in fold.sites]
    scale = TRANSFORMS["smoothquant"].scale(fold, weights, known, None)
    x = known[0].importance.sqrt()
    x = x.maximum(1e-4 * x.max())  # a channel that is hardly used
    w = torch.cat(weights).abs().amax(0)
    torch.testing.assert_close(scale, (x / w).sqrt())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_folded_checkpoint_is_the_same_model(name, outliers):
    original, layout, statistics = outliers
    format = FORMAT if TRANSFORMS[name].tuned else None
    folding = Folding(original, name, format, statistics.identity)
    write_folded(folding, original, layout, default_device())
    assert folding.ready
    before, after = (load_model(c, torch.float32) for c in (original, folding.checkpoint))
    assert not torch.equal(before.model.layers[0].self_attn.q_proj.weight,
                           after.model.layers[0].self_attn.q_proj.weight)  # fmt: skip
    assert (logits(after) - logits(before)).norm() < 1e-4 * logits(before).norm()
    assert describe(folding.checkpoint) == layout
    assert resolve(original.name).weights_hash == original.weights_hash  # left as it was


def test_each_expert_has_its_own_scales(folder):
    original, layout, statistics = calibrated(folder("mixtral"))
    folding = Folding(original, "awq", FORMAT, statistics.identity)
    write_folded(folding, original, layout, default_device())
    before, after = (load_model(c, torch.float32) for c in (original, folding.checkpoint))
    old, new = (m.model.layers[0].mlp.experts.gate_up_proj[:, 96:, 0] for m in (before, after))
    ratios = new / old  # of the up projections' rows, times one scale of the column
    assert not torch.allclose(ratios[0], ratios[1], rtol=0.01)
    assert (logits(after) - logits(before)).norm() < 1e-4 * logits(before).norm()


def test_the_hash_tells_what_it_was_made_from(outliers):
    original, _, _ = outliers
    folding = Folding(original, "awq", FORMAT, "text")
    others = [replace(folding, **change) for change in (
        {"transform": "smoothquant"}, {"format": "int8-g32"}, {"statistics": "other"},
        {"original": replace(original, weights_hash="0")},
    )]  # fmt: skip
    hashes = {f.checkpoint.weights_hash for f in (folding, *others)}
    assert len(hashes) == 5
    assert original.weights_hash not in hashes


def test_a_fold_that_changes_the_model_is_not_written(outliers, monkeypatch):
    original, layout, statistics = outliers
    monkeypatch.setattr(finding, "_holds", lambda *_: True)  # the first guess is a gate
    folding = Folding(original, "smoothquant", None, statistics.identity + "wrong")
    monkeypatch.setattr(checkpoint, "Statistics", lambda _: statistics)
    with pytest.raises(ModelError, match="isn't the same model once it is folded"):
        write_folded(folding, original, layout, default_device())
    assert not folding.ready
