"""KV caches in a format: what one pass computes is what an engine computes token by token."""

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from evaluation.assembly import AssembledModel
from evaluation.caches import Caches, keeps, quantized
from evaluation.evaluator import Evaluator
from evaluation.online import Written
from evaluation.passes import Passes
from quantization.adapter import describe
from quantization.bank import Bank
from quantization.errors import MeasurementError, ModelError
from quantization.formats import FORMATS
from quantization.quantizers import QUANTIZERS
from quantization.schemes import Scheme
from quantization.units import KEYS, VALUES, Layout, cache_slot
from tests.conftest import CONFIGS, choices_of

CPU = torch.device("cpu")
IDS = np.random.default_rng(3).integers(2, 300, 24)
MENU = [Scheme(name) for name in ("bf16", "int8-channel", "int4-channel", "fp8-e4m3")]
DENSE = [
    family for family in CONFIGS if family not in ("mixtral", "gpt_oss") and "moe" not in family
]


def with_caches(bank, sharing="apart"):
    """The same bank where caches are units, too, and the schemes of each unit."""
    layout = bank.layout.with_caches(sharing)
    own = Bank(bank.checkpoint, layout, QUANTIZERS["rtn"], torch.float32)
    weights = choices_of(bank.layout)
    choices = weights + [MENU] * (len(layout.units) - len(weights))
    own.build(choices)
    return own, choices


def only_caches(layout, name):
    """Exact weights, and every cache in one format."""
    return [Scheme(name) if unit.kind == "cache" else None for unit in layout.units]


class OneByOne(DynamicCache):
    """What engines do: a row is quantized when it arrives, and never again."""

    def __init__(self, formats):
        super().__init__()
        self.formats = formats

    def update(self, keys, values, layer_idx, *args, **kwargs):
        rows = [
            quantized(states, self.formats[layer_idx, kind])
            for kind, states in ((KEYS, keys), (VALUES, values))
        ]
        return super().update(*rows, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("name", ["int4-channel", "fp8-e4m3"])
def test_a_pass_computes_what_generation_computes(make_bank, family, name):
    bank, _ = with_caches(make_bank(family))
    evaluator = Evaluator(bank, CPU)
    evaluator.model.assign(only_caches(bank.layout, name))
    ours = evaluator.hidden(evaluator.model.module, IDS)
    sites = [s for unit in bank.layout.units if unit.kind == "cache" for s in unit.sites]
    past = OneByOne({cache_slot(site): name for site in sites})
    evaluator.model.assign(None)
    step, module = [], evaluator.model.module.base_model
    with torch.inference_mode():
        for token in IDS:
            batch = torch.tensor([[int(token)]])
            step.append(module(batch, past_key_values=past, use_cache=True).last_hidden_state[0])
    exact = evaluator.hidden(evaluator.model.module, IDS)
    # sums in another order now and then round one number to the next code
    assert (ours - torch.cat(step)).norm() < 0.02 * (ours - exact).norm()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_layer_alone_is_quantized_and_let_go_of_again(make_bank, family):
    bank, _ = with_caches(make_bank(family))
    evaluator = Evaluator(bank, CPU)
    exact = evaluator.measure([None] * len(bank.layout.units), IDS).kl_sum
    found = []
    for u, unit in enumerate(bank.layout.units):
        if unit.kind == "cache":
            schemes = [None] * len(bank.layout.units)
            schemes[u] = Scheme("int4-channel")
            found.append(evaluator.measure(schemes, IDS).kl_sum)
    assert exact == pytest.approx(0, abs=1e-6)
    assert len(found) == 4  # keys and values of two layers
    assert len({round(kl, 8) for kl in found}) == 4
    assert min(found) > 1e-5
    assert evaluator.measure([None] * len(bank.layout.units), IDS).kl_sum == exact


def test_finer_formats_lose_less(make_bank):
    bank, _ = with_caches(make_bank("llama"))
    evaluator = Evaluator(bank, CPU)
    names = ("bf16", "int8-channel", "int4-channel", "int2-channel")
    losses = [evaluator.measure(only_caches(bank.layout, n), IDS).kl_sum for n in names]
    assert losses == sorted(losses)


def test_blocks_and_whole_passes_agree(make_bank):
    """A pass that is cut between blocks quantizes the same rows."""
    bank, _ = with_caches(make_bank("llama"))
    evaluator = Evaluator(bank, CPU)
    schemes = only_caches(bank.layout, "int4-channel")
    passes = Passes(evaluator.model, IDS[None], schemes=schemes)
    passes.forward()
    cut = passes.blocks.finish(passes.ids[0], passes.states[-1][0])
    evaluator.model.assign(schemes)
    assert torch.equal(cut.detach(), evaluator.hidden(evaluator.model.module, IDS))


def test_gradients_go_straight_through(make_bank):
    """By what attention reads, at the point where it reads it: a difference quotient agrees."""
    bank, _ = with_caches(make_bank("llama"))
    model = AssembledModel(bank, CPU)
    model.assign(only_caches(bank.layout, "int4-channel"))
    batch = torch.from_numpy(IDS)[None]
    weight = torch.randn(len(IDS), 64, generator=torch.Generator().manual_seed(0))

    def value():
        return (model.module.base_model(batch, use_cache=False).last_hidden_state[0] * weight).sum()

    written: dict[tuple[int, str], list[Written]] = {(1, KEYS): []}
    hidden = model.module.get_input_embeddings()(batch).detach().requires_grad_()
    with model.caches.watch(written):
        states = model.module.base_model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    [found] = written[1, KEYS]
    (gradient,) = torch.autograd.grad((states[0] * weight).sum(), found.kept)
    direction = torch.randn(found.exact.shape, generator=torch.Generator().manual_seed(1))
    through, moved = model.caches.through, []
    with torch.no_grad():
        for step in (1e-3, -1e-3):

            def shifted(layer, kind, states, step=step):
                kept = through(layer, kind, states)
                return kept + step * direction if (layer, kind) == (1, KEYS) else kept

            model.caches.through = shifted
            moved.append(float(value()))
    assert (moved[0] - moved[1]) / 2e-3 == pytest.approx(
        float((gradient * direction).sum()), rel=0.02, abs=0.01
    )


ADMITTED = [name for name in FORMATS if keeps(name) and not FORMATS[name].refusal((2, 32))]


@pytest.mark.parametrize("name", ADMITTED)
def test_rows_are_quantized_by_themselves(name):
    """Of every format that a cache may have: else a token's past would depend on its future."""
    states = torch.randn(1, 2, 3, 32, generator=torch.Generator().manual_seed(2))
    states[0, :, 1] *= 30
    whole = quantized(states, name)
    alone = torch.cat([quantized(states[:, :, t : t + 1], name) for t in range(3)], dim=2)
    assert torch.equal(whole, alone)


def test_formats_that_mix_tokens_are_no_caches():
    """Tensor scales, tiles, picked columns and outliers, importance."""
    for name in ("nvfp4", "int8-g32-fp8", "fp8-e5m2", "fp8-e4m3-b128", "int4-g64@0.45%",
                 "owq-int3-g64@1%", "fgmp@30%", "mixllm-int4-g64-asym@10%", "gguf-iq2_xxs",
                 "squeezellm4"):  # fmt: skip
        assert not keeps(name), name
    assert {"int4-g32", "int8-channel", "fp8-e4m3", "gguf-q8_0", "nf4-g32", "mxfp8"} < {*ADMITTED}


def test_bytes_are_those_of_the_packed_rows():
    states = torch.randn(7 * 2, 32)
    for name in ("int4-g32", "int8-channel", "gguf-q8_0", "bf16", "nf4-g32"):
        packed = QUANTIZERS["rtn"].quantize(states, FORMATS[name]).pack()
        assert packed.nbytes == FORMATS[name].nbytes((7 * 2, 32))


def test_what_has_one_format():
    bank_layout = Layout.from_json(_layout().to_json())
    assert bank_layout == _layout()
    names = {
        sharing: [u.name for u in _layout().with_caches(sharing).units if u.kind == "cache"]
        for sharing in ("apart", "layers", "kinds", "all")
    }
    assert names["kinds"] == ["k_cache", "v_cache"]
    assert names["all"] == ["kv_cache"]
    assert names["layers"] == ["model.layers.0.kv_cache", "model.layers.1.kv_cache"]
    assert names["apart"] == [
        f"model.layers.{i}.{kind}" for i in range(2) for kind in (KEYS, VALUES)
    ]
    for sharing in names:
        units = [u for u in _layout().with_caches(sharing).units if u.kind == "cache"]
        assert len({site.name for unit in units for site in unit.sites}) == 4
        assert all(unit.numel == 0 and not unit.stored for unit in units)


def _layout():
    from quantization.units import CacheLayer, Site, Unit

    units = tuple(
        Unit(
            f"model.layers.{i}.mlp.up_proj",
            "linear",
            (
                Site(
                    f"model.layers.{i}.mlp.up_proj", f"model.layers.{i}.mlp.up_proj.weight", (8, 8)
                ),
            ),
            i,
        )
        for i in range(2)
    )
    return Layout(units, (), 8, tuple(CacheLayer(64, None, i, (2, 16), (2, 16)) for i in range(2)))


def test_unknown_caches_are_refused():
    bare = Layout(_layout().units, (), 8, ())
    with pytest.raises(ModelError, match="leave the cache out of the menu"):
        bare.with_caches("apart")


def test_attentions_that_take_no_cache_are_refused(make_bank):
    layout = describe(make_bank("llama").checkpoint).with_caches("apart")
    with pytest.raises(MeasurementError, match="layer 0 isn't given its KV cache"):
        Caches(torch.nn.Linear(2, 2)).check(layout)


@pytest.mark.parametrize(
    ("value", "name"), [(torch.inf, "int8-g32"), (3e7, "int4-g32"), (1e9, "gguf-q8_0")]
)
def test_what_no_scale_reaches_is_a_broken_candidate(value, name):
    """A measurement fails, and a job goes on."""
    with pytest.raises(MeasurementError, match="keys or values of a candidate can't be kept in"):
        quantized(torch.full((1, 1, 1, 32), value), name)
