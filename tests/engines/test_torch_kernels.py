"""Our own kernels as an engine: any format, timed with what would serve it."""

import pytest
import torch

from engines import load_engine
from engines.base import Cell, Exercise
from engines.torch_kernels import _Model, _packed
from quantization.adapter import describe
from quantization.errors import KernelError
from quantization.kernels.packed_weight import PackedWeight
from quantization.schemes import Scheme
from quantization.units import Site

ENGINE = load_engine("torch")


def test_rules():
    site = Site("q", "q.weight", (64, 96))
    assert ENGINE.refusal(site, Scheme("int4-g32")) is None
    assert ENGINE.refusal(site, Scheme("gguf-q8_0")) is None
    assert "don't divide" in ENGINE.refusal(Site("q", "q", (64, 100)), Scheme("gguf-q8_0"))
    assert "packed experts" in ENGINE.refusal(Site("e", "e", (4, 64, 96)), Scheme("int4-g32"))
    assert ENGINE.nbytes(Scheme("int4-g32"), (64, 96)) == 64 * 96 // 2 + 64 * 3 * 2


def test_products_are_timed():
    cells = [
        Cell((512, 512), name, batch) for name in ("int8-channel", "bf16") for batch in (1, 64)
    ]
    found = ENGINE.time_cells(cells, 1, None)
    assert all(timing.median_s > 0 and timing.spread_s >= 0 for timing in found)
    assert found[0].median_s < found[1].median_s
    with pytest.raises(KernelError, match="no format 'int9'"):
        ENGINE.time_cells([Cell((64, 64), "int9", 1)], 1, None)


def test_whole_models_run_on_packed_weights(llama):
    layout = describe(llama).split()
    schemes = [Scheme("bf16" if u.layer is None else "int8-channel") for u in layout.units]
    with torch.inference_mode():
        module = _packed(llama, layout, schemes)
    weight = module.get_submodule("model.layers.0.mlp.up_proj").weight
    assert isinstance(weight, PackedWeight) or isinstance(weight.data, PackedWeight)
    exercise = Exercise(prompt=16, past=8, generated=3, threads=1)
    own, beside = ENGINE.time_map(llama, layout, schemes, schemes, exercise)
    assert len(own.decode_s) == len(beside.decode_s) == 3
    assert min(*own.prefill_s, *own.decode_s) > 0


def test_a_batch_is_run_with_a_cache_for_each_sequence(llama):
    layout = describe(llama).split()
    schemes = [Scheme("bf16") for _ in layout.units]
    with torch.inference_mode():
        model = _Model(_packed(llama, layout, schemes), 3)
        model.start(5)
        model.step_s()
    keys = model._cache.layers[0].keys
    assert keys.shape[0] == 3
    assert keys.shape[-2] == 6
