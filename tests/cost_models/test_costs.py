"""Costs: bytes are exact, the KV cache is counted by layer."""

import pytest

from cost_models import weight_bytes
from cost_models.memory import Workload, kv_cache_bytes
from quantization.formats import FORMATS
from quantization.schemes import Scheme
from quantization.units import CacheLayer, Layout
from tests.conftest import MENU, choices_of


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_predicted_bytes_equal_packed_bytes(make_bank, family):
    """Of a whole model, tied parameters once, against the tensors that packing gives."""
    import torch

    from quantization.checkpoints import load_model
    from quantization.quantizers import QUANTIZERS

    bank = make_bank(family)
    layout = bank.layout
    parameters = dict(load_model(bank.checkpoint, torch.float32).named_parameters())
    schemes = [row[-1] for row in choices_of(layout)]
    packed = 0
    placed = set()
    for unit, scheme in zip(layout.units, schemes, strict=True):
        for site in unit.stored:
            placed.add(site.parameter)
            weight = parameters[site.parameter]
            packed += QUANTIZERS["rtn"].quantize(weight, FORMATS[scheme.weight]).pack().nbytes
    packed += sum(2 * p.numel() for name, p in parameters.items() if name not in placed)
    table = weight_bytes.table(layout, MENU)
    predicted = sum(
        weight_bytes.unit_bytes(unit, scheme)
        for unit, scheme in zip(layout.units, schemes, strict=True)
    ) + weight_bytes.other_bytes(layout)
    assert predicted == packed
    assert table.shape == (len(layout.units), len(MENU))


def test_the_cache_counts_batch_context_and_windows():
    layout = Layout((), (), 0, (CacheLayer(64), CacheLayer(64, window=100)))
    assert kv_cache_bytes(layout, Workload(batch=3, context=1000)) == 2 * 3 * 64 * (1000 + 100)
    assert kv_cache_bytes(layout, Workload(1, 50)) == 2 * 64 * 100


def test_smollm2_like_cache():
    """30 layers, 3 key-value heads of 64: 22.5 KiB a token in bf16."""
    layout = Layout((), (), 0, tuple(CacheLayer(2 * 3 * 64) for _ in range(30)))
    assert kv_cache_bytes(layout, Workload(1, 1)) == 30 * 2 * 3 * 64 * 2


def test_schemes_are_named_by_their_formats():
    assert Scheme.parse("int4-g64") == Scheme("int4-g64", "bf16")
    assert Scheme("int4-g64", "int8-token").name == "int4-g64/int8-token"
