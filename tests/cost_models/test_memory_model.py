"""Memory: what one rank holds, part by part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models import weight_bytes
from cost_models.memory import (
    Workload,
    WorkloadError,
    activation_bytes,
    footprint,
    kv_cache_bytes,
)
from quantization.formats import FORMATS
from quantization.schemes import Scheme
from quantization.units import CacheLayer, Layout
from tests.conftest import tiny_config
from tests.cost_models.test_roofline import model_of

BF16, INT4 = Scheme("bf16"), Scheme("int4-g32")


@pytest.fixture(scope="module")
def tiny_llama():
    return model_of(tiny_config("llama"))


@pytest.mark.parametrize("field", ["batch", "context", "prompt", "generated", "tensor_parallel"])
@pytest.mark.parametrize("value", [0, -3, 1.5, True, "2"])
def test_a_workload_is_whole_numbers_from_one(field, value):
    with pytest.raises(WorkloadError, match=rf"workload's {field} is {value!r}; give a whole"):
        Workload(**{field: value})


def test_a_workload_starts_with_batch_and_context():
    assert Workload(3, 100) == Workload(batch=3, context=100, prompt=512, generated=128)


def test_weights_by_hand(tiny_llama):
    layout, geometry = tiny_llama
    schemes = [BF16 if unit.layer is None else INT4 for unit in layout.units]
    held = footprint(layout, geometry, schemes, Workload(2, 50))
    assert held.blocks == sum(
        FORMATS["int4-g32"].nbytes(site.shape)
        for unit in layout.units if unit.layer is not None
        for site in unit.sites
    )  # fmt: skip
    assert held.outside == 2 * (2 * 320 * 64 + layout.other_numel)  # embedding and head
    assert held.cache == 2 * 50 * 2 * (2 * 2 * 16) * 2  # sequences, tokens, layers, K+V, bytes
    assert held.workspace == 2 * 96 * 64  # the largest matrix in bf16
    assert held.total == sum(
        (held.blocks, held.outside, held.cache, held.activations, held.workspace)
    )
    weights = sum(
        weight_bytes.unit_bytes(u, s) for u, s in zip(layout.units, schemes, strict=True)
    ) + weight_bytes.other_bytes(layout)
    assert held.blocks + held.outside == weights
    assert held.total - held.activations - held.workspace == weights + kv_cache_bytes(
        layout, Workload(2, 50)
    )


def test_tied_parameters_are_held_once(tiny_llama):
    tied = model_of(tiny_config("llama", tie_word_embeddings=True))
    sizes = [
        footprint(layout, geometry, [BF16] * len(layout.units), Workload()).outside
        for layout, geometry in (tiny_llama, tied)
    ]
    assert sizes[0] - sizes[1] == 2 * 320 * 64


def test_full_precision_needs_no_workspace(tiny_llama):
    layout, geometry = tiny_llama
    assert footprint(layout, geometry, [BF16] * len(layout.units), Workload()).workspace == 0


def test_a_cache_may_differ_by_layer():
    layout = Layout((), (), 0, (CacheLayer(64), CacheLayer(64, window=100)))
    workload = Workload(3, 1000)
    assert kv_cache_bytes(layout, workload, 8) == 3 * 64 * (1000 + 100)
    assert kv_cache_bytes(layout, workload, [16, 4.5]) == 3 * 64 * (2000 + 56.25)
    with pytest.raises(WorkloadError, match=r"the cache's bits are \[8\]; give one number above 0"):
        kv_cache_bytes(layout, workload, [8])
    with pytest.raises(WorkloadError, match=r"bits are 0"):
        kv_cache_bytes(layout, workload, 0)


def test_activations_by_hand(tiny_llama):
    """Long prompts peak in gate and up (2 x 96 wide), short ones at the logits."""
    layout, geometry = tiny_llama
    long = activation_bytes(layout, geometry, Workload(2, prompt=1000))
    assert long == 2 * 1000 * (2 * 64 + 2 * 96) * 2
    short = activation_bytes(layout, geometry, Workload(1, prompt=1))
    assert short == 320 * 4 + 64 * 2


@given(
    ranks=st.integers(1, 8), batch=st.integers(1, 64), context=st.integers(1, 5000)
)  # fmt: skip
def test_ranks_hold_shares_and_never_less_than_all(tiny_llama, ranks, batch, context):
    layout, geometry = tiny_llama
    schemes = [INT4] * len(layout.units)
    one = footprint(layout, geometry, schemes, Workload(batch, context))
    each = footprint(layout, geometry, schemes, Workload(batch, context, tensor_parallel=ranks))
    for part in ("blocks", "outside", "cache"):
        assert getattr(one, part) / ranks <= getattr(each, part) <= getattr(one, part)
    # two key-value heads: beyond two ranks, caches are copies
    assert each.cache == (one.cache if ranks == 1 else one.cache // 2)


def test_experts_count_whole():
    layout, geometry = model_of(tiny_config("mixtral"))
    held = footprint(layout, geometry, [BF16] * len(layout.units), Workload(prompt=1000))
    experts = next(unit for unit in layout.units if unit.kind == "experts")
    assert held.blocks > 2 * 2 * experts.numel  # all four experts of both layers
    assert held.activations == 1000 * (2 * 64 + 2 * (2 * 96 + 64)) * 2  # two visited by a token
