"""Seconds and joules: hand-computed values, and what must hold whatever the sizes."""

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cost_models import energy, roofline
from cost_models.devices import DEVICES, DeviceError, Energy
from cost_models.geometry import geometry_of
from cost_models.memory import Workload, WorkloadError
from cost_models.operations import unit_operators
from cost_models.roofline import operators, seconds
from quantization.adapter import find_units
from quantization.errors import ModelError
from quantization.formats import FORMATS
from quantization.schemes import Scheme
from quantization.units import Layout
from tests.conftest import CONFIGS, tiny_config
from tests.cost_models.test_devices import a_device

BF16, INT8, INT4 = Scheme("bf16"), Scheme("int8-channel"), Scheme("int4-g128")
W8A8 = Scheme("int8-channel", "int8-token")


def model_of(config):
    """Layout and geometry from a configuration; no weight exists."""
    with FakeTensorMode():
        layout = find_units(transformers.AutoModelForCausalLM.from_config(config))
    return layout, geometry_of(config, layout)


@pytest.fixture(scope="module")
def llama2():
    """Two blocks of Llama-2-7B."""
    return model_of(
        transformers.LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32,
            num_key_value_heads=32, vocab_size=32000,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama3():
    """Two blocks of Llama-3-8B: 8 key-value heads for 32 query heads."""
    return model_of(
        transformers.LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128256,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def mixtral():
    """One block of Mixtral-8x7B."""
    return model_of(
        transformers.MixtralConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32,
            num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, vocab_size=32000,
        )
    )  # fmt: skip


def unit_of(model, name):
    layout, _ = model
    return next((i, u) for i, u in enumerate(layout.units) if u.name.endswith(name))


def products(model, name, scheme, workload, phase, arithmetic="bf16"):
    index, unit = unit_of(model, name)
    return unit_operators(index, unit, scheme, model[1], workload, phase, arithmetic)


def test_decode_of_a_linear_by_hand(llama2):
    """o_proj, 4096 x 4096 in bf16: 32 MiB of weights, two operations each, 2 x 8 KiB around it."""
    (product,) = products(llama2, "0.self_attn.o_proj", BF16, Workload(), "decode")
    assert product.weight_bytes == 4096 * 4096 * 2
    assert product.ops == 2 * 4096 * 4096
    assert product.activation_bytes == (4096 + 4096) * 2
    # 33.6 MB at 1 TB/s; 33.6 MFLOP at 100 TFLOPS are hidden behind them
    assert seconds(product, a_device()) == pytest.approx((4096 * 4096 * 2 + 16384) / 1e12)
    assert seconds(product, a_device(launch_s=3e-6)) == pytest.approx(36.57e-6, rel=1e-3)


def test_fused_units_are_one_product(llama2):
    (product,) = products(llama2, "0.mlp.gate_proj+up_proj", INT4, Workload(), "decode")
    assert product.product == (1, 2 * 11008)
    assert product.weight_bytes == 2 * FORMATS["int4-g128"].nbytes((11008, 4096))


def test_prefill_of_a_linear_by_hand(llama2):
    """2048 tokens make o_proj compute-bound: 68.7 GFLOP at 100 TFLOPS."""
    (product,) = products(llama2, "0.self_attn.o_proj", BF16, Workload(prompt=2048), "prefill")
    assert seconds(product, a_device()) == pytest.approx(2 * 2048 * 4096 * 4096 / 1e14)


def test_whole_decode_of_llama_2_by_hand(llama2):
    """Every weight but the looked-up embedding once: the step's bytes, to the byte."""
    layout, geometry = llama2
    found = operators(layout, geometry, [BF16] * len(layout.units), Workload(1, 100), "decode")
    block = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert sum(part.weight_bytes for part in found) == 2 * (
        2 * block + 32000 * 4096 + layout.other_numel
    )
    cached = sum(part.cache_bytes for part in found)
    assert cached == 2 * (100 + 1) * 2 * 32 * 128 * 2  # layers, tokens, K and V, heads, bytes


def test_grouped_queries_share_their_cache(llama2, llama3):
    """Llama-3 has a quarter of the key-value heads, so decode reads a quarter of the cache."""
    cached, computed = [], []
    for layout, geometry in (llama2, llama3):
        schemes = [BF16] * len(layout.units)
        found = operators(layout, geometry, schemes, Workload(4, 1000), "decode")
        cached.append(sum(part.cache_bytes for part in found))
        computed.append(sum(part.ops for part in found if part.name.startswith("attention")))
    assert cached[0] == 4 * cached[1]
    assert computed[0] == computed[1]  # the queries are as many
    assert cached[1] == 2 * 4 * 1001 * 2 * 8 * 128 * 2


def test_a_smaller_cache_format_reads_fewer_bytes(llama3):
    layout, geometry = llama3
    device, workload = DEVICES["h100-sxm"], Workload(64, 8192)
    whole = roofline.fixed_s(layout, geometry, device, workload, "decode")
    half = roofline.fixed_s(layout, geometry, device, workload, "decode", cache_bits=8)
    mixed = roofline.fixed_s(layout, geometry, device, workload, "decode", cache_bits=[16, 8])
    assert half < mixed < whole
    with pytest.raises(WorkloadError, match=r"or 2 of them"):
        roofline.fixed_s(layout, geometry, device, workload, "decode", cache_bits=[8])


def test_half_the_weight_bytes_are_half_the_time_of_memory_bound_decode(llama2):
    device = a_device(vector_ops_per_s=1e20)
    times = [
        seconds(products(llama2, "0.self_attn.o_proj", s, Workload(), "decode")[0], device)
        for s in (BF16, INT8)
    ]
    assert times[1] / times[0] == pytest.approx(0.5, rel=2e-3)


@pytest.mark.parametrize("name", ["a100-80", "h100-sxm", "rtx-4090", "m3-max"])
def test_four_bit_weights_help_decode_and_not_prefill(llama2, name):
    """W4A16 reads less, but computes what bf16 computes and unpacks weights beside that."""
    layout, geometry = llama2
    device, workload = DEVICES[name], Workload(1, 500, prompt=4096)
    index, _ = unit_of(llama2, "0.mlp.down_proj")
    decode, prefill = (
        roofline.table(layout, geometry, [BF16, INT4], device, workload, phase)[index]
        for phase in ("decode", "prefill")
    )
    assert decode[1] < decode[0]
    assert prefill[1] >= prefill[0]


def test_eight_bit_inputs_help_prefill(llama2):
    layout, geometry = llama2
    index, _ = unit_of(llama2, "0.mlp.down_proj")
    row = roofline.table(
        layout, geometry, [BF16, INT8, W8A8], DEVICES["a100-80"], Workload(prompt=4096), "prefill"
    )[index]
    assert row[2] < row[0] <= row[1]


def test_tiles_round_up(llama2):
    """129 rows take as many tiles as 256."""
    device = a_device(tile={"m": 128, "n": 128, "units": 1})
    times = [
        seconds(
            products(llama2, "0.self_attn.o_proj", BF16, Workload(prompt=rows), "prefill")[0],
            device,
        )
        for rows in (128, 129, 256)
    ]
    assert times[0] < times[1] == pytest.approx(times[2])
    (one,) = products(llama2, "0.self_attn.o_proj", BF16, Workload(), "decode")
    assert roofline._rounding(one, device) == 1.0  # matrix times vector computes no padding


def test_an_embedding_costs_nothing_and_a_tied_head_a_product():
    plain, tied = (model_of(tiny_config("llama", tie_word_embeddings=tie)) for tie in (False, True))
    times = []
    for layout, geometry in (plain, tied):
        table = roofline.table(layout, geometry, [BF16], a_device(), Workload(), "decode")[:, 0]
        assert layout.units[0].kind == "embedding"
        times.append((table[0], table[-1] if layout is plain[0] else None))
    assert times[0][0] == 0
    assert times[1][0] == times[0][1] > 0


def test_the_head_sees_one_token_a_sequence(llama2):
    (product,) = products(llama2, "lm_head", BF16, Workload(3, prompt=500), "prefill")
    assert product.product == (3, 32000)


def test_decode_reads_only_the_chosen_experts(mixtral):
    """One token reads 2 of 8 experts, many tokens read all; prefill reads all."""
    name = "experts.gate_up_proj+down_proj"
    whole = sum(
        FORMATS["bf16"].nbytes(site.shape) for site in unit_of(mixtral, name)[1].stored
    )  # fmt: skip
    read = [
        sum(p.weight_bytes for p in products(mixtral, name, BF16, Workload(batch), "decode"))
        for batch in (1, 2, 200)
    ]
    assert read[0] == pytest.approx(whole * 2 / 8)
    assert read[1] == pytest.approx(whole * (1 - (6 / 8) ** 2))
    assert read[2] == pytest.approx(whole)
    prefill = products(mixtral, name, BF16, Workload(prompt=8), "prefill")
    assert sum(p.weight_bytes for p in prefill) == whole
    # the work is that of two experts a token
    assert sum(p.ops for p in prefill) == 2 * 8 * 2 * 3 * 4096 * 14336


def test_windows_limit_attention():
    layout, geometry = model_of(tiny_config("gemma2", sliding_window=32))
    assert {layer.window for layer in geometry.layers} == {32, None}
    found = operators(layout, geometry, [BF16] * len(layout.units), Workload(1, 200), "decode")
    ops = sorted(part.ops for part in found if part.name.startswith("attention"))
    assert ops[1] / ops[0] == 200 / 32


@pytest.mark.parametrize("name", ["a100-80", "h100-sxm"])
def test_tensor_parallel_divides_products_and_adds_exchanges(llama3, name):
    layout, geometry = llama3
    one, two = Workload(1, 4000), Workload(1, 4000, tensor_parallel=2)
    device = DEVICES[name].model_copy(update={"launch_s": 0.0})
    whole, half = (
        roofline.table(layout, geometry, [BF16, INT4], device, w, "decode") for w in (one, two)
    )
    # but for whole waves of tiles; the first row is the embedding's look-up
    assert half[1:] == pytest.approx(whole[1:] / 2, rel=0.02)
    names = [part.name for part in operators(*llama3, [BF16] * len(layout.units), two, "decode")]
    assert [n for n in names if n.startswith("all_reduce")] == ["all_reduce.0", "all_reduce.1"]
    cached = [
        sum(p.cache_bytes for p in operators(*llama3, [BF16] * len(layout.units), w, "decode"))
        for w in (one, two, Workload(1, 4000, tensor_parallel=16))
    ]
    assert cached[1] == cached[0] / 2
    assert cached[2] == cached[0] / 8  # 8 heads: two ranks hold copies of each


def test_tensor_parallel_without_a_link_is_refused(llama3):
    layout, geometry = llama3
    workload = Workload(tensor_parallel=2)
    with pytest.raises(DeviceError, match=r"'rtx-4090' has no link for tensor parallelism \(no pe"):
        roofline.fixed_s(layout, geometry, DEVICES["rtx-4090"], workload, "decode")
    with pytest.raises(WorkloadError, match=r"over 4 is more than the 2 that 'h100-pcie'"):
        roofline.fixed_s(
            layout, geometry, DEVICES["h100-pcie"], Workload(tensor_parallel=4), "decode"
        )


def test_engines_decide_arithmetic_and_what_runs(llama2):
    layout, geometry = llama2
    menu = [BF16, Scheme("gguf-q4_0"), Scheme("int3-g64")]
    args = (layout, geometry, menu, DEVICES["a100-80"], Workload(), "decode")
    table = roofline.table(*args, engine="llama.cpp")
    assert np.isfinite(table[1:, :2]).all()
    assert np.isinf(table[:, 2]).all()
    with pytest.raises(DeviceError, match=r"llama.cpp has no kernel for int3-g64.*'model.embed"):
        operators(
            layout, geometry, [menu[2]] * len(layout.units), Workload(), "decode",
            DEVICES["a100-80"], "llama.cpp",
        )  # fmt: skip
    # three matrices that llama.cpp doesn't fuse are three launches, each of which reads the input
    index, _ = unit_of(llama2, "0.self_attn.q_proj+k_proj+v_proj")
    fused = roofline.table(*args, engine="vllm")[index, 0]
    assert table[index, 0] == pytest.approx(fused + 2 * DEVICES["a100-80"].launch_s, rel=1e-3)


def test_a_map_is_the_sum_of_its_entries_and_what_is_fixed(llama3):
    layout, geometry = llama3
    menu, device = [BF16, INT4], DEVICES["l40s"]
    rng = np.random.default_rng(0)
    for phase in ("prefill", "decode"):
        chosen = rng.integers(0, 2, len(layout.units))
        schemes = [menu[i] for i in chosen]
        workload = Workload(2, 300, prompt=40)
        table = roofline.table(layout, geometry, menu, device, workload, phase)
        total = table[np.arange(len(chosen)), chosen].sum()
        total += roofline.fixed_s(layout, geometry, device, workload, phase)
        found = operators(layout, geometry, schemes, workload, phase)
        assert total == pytest.approx(sum(seconds(part, device) for part in found))


def test_an_unknown_phase_is_refused(llama2):
    layout, geometry = llama2
    with pytest.raises(WorkloadError, match=r"unknown phase 'decoding'; phases are prefill and"):
        roofline.table(layout, geometry, [BF16], a_device(), Workload(), "decoding")


@given(
    batch=st.integers(1, 300),
    context=st.integers(1, 20000),
    more=st.integers(1, 50),
    name=st.sampled_from(sorted(DEVICES)),
    scheme=st.sampled_from([BF16, INT4, W8A8]),
)
def test_more_work_never_takes_less_time(tiny_llama, batch, context, more, name, scheme):
    layout, geometry = tiny_llama
    device = DEVICES[name]

    def total(workload, phase):
        column = roofline.table(layout, geometry, [scheme], device, workload, phase)
        return column.sum() + roofline.fixed_s(layout, geometry, device, workload, phase)

    base = total(Workload(batch, context), "decode")
    assert base > 0
    assert total(Workload(batch + more, context), "decode") >= base
    assert total(Workload(batch, context + more), "decode") >= base
    assert total(Workload(batch, prompt=context + more), "prefill") >= total(
        Workload(batch, prompt=context), "prefill"
    )


@pytest.fixture(scope="module")
def tiny_llama():
    return model_of(tiny_config("llama"))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_has_a_geometry(family):
    layout, geometry = model_of(tiny_config(family))
    assert [layer.cache_elements for layer in geometry.layers] == [c.elements for c in layout.cache]
    heads = {(layer.heads, layer.kv_heads, layer.head_dim) for layer in geometry.layers}
    others = {"gpt_neox": (4, 4, 16), "deepseek_v3": (4, 4, 32)}
    assert heads == {others.get(family, (4, 2, 16))}
    assert (geometry.hidden, geometry.vocab) == (64, 320)
    table = roofline.table(layout, geometry, [BF16], a_device(), Workload(), "decode")
    assert np.isfinite(table).all()


def test_a_configuration_without_sizes_says_so():
    class Config:
        model_type = "odd"

    with pytest.raises(ModelError, match=r"configuration of 'odd' has no hidden_size"):
        geometry_of(Config(), Layout((), (), 0))


def test_energy_by_hand(llama2):
    """10 W for 33.57 us, 1 pJ a byte, 2 pJ an operation."""
    device = a_device(
        idle_w=10,
        energy=Energy(memory_j_per_byte=1e-12, op_j={"bf16": 2e-12, "int8": 1e-12}, source="x"),
    )
    (product,) = products(llama2, "0.self_attn.o_proj", BF16, Workload(), "decode")
    moved = 4096 * 4096 * 2 + 16384
    by_hand = 10 * moved / 1e12 + 1e-12 * moved + 2e-12 * 2 * 4096 * 4096
    assert energy.joules(product, device) == pytest.approx(by_hand)
    layout, geometry = llama2
    table = energy.table(layout, geometry, [BF16, INT4], device, Workload(), "decode")
    assert (table[1:, 1] < table[1:, 0]).all()
    assert energy.fixed_j(layout, geometry, device, Workload(), "decode") > 0


def test_energy_without_coefficients_is_refused_or_bounded(llama2):
    layout, geometry = llama2
    device = DEVICES["a100-80"]
    with pytest.raises(DeviceError, match=r"'a100-80' has no energy coefficients \(no measured"):
        energy.table(layout, geometry, [BF16], device, Workload(), "decode")
    assert energy.limit_j(2.0, device, ranks=4) == 2 * 400 * 4
    with pytest.raises(DeviceError, match=r"'m3-max' has no tdp_w \(Apple publishes none\)"):
        energy.limit_j(1.0, DEVICES["m3-max"])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_energy_made_of_the_power_limit_stays_within_it(llama3, phase):
    layout, geometry = llama3
    device = energy.from_power(DEVICES["h100-sxm"])
    assert "not measured" in device.energy.source
    workload = Workload(8, 1000, prompt=1000)
    spent = energy.table(layout, geometry, [BF16], device, workload, phase).sum()
    spent += energy.fixed_j(layout, geometry, device, workload, phase)
    time_s = roofline.table(layout, geometry, [BF16], device, workload, phase).sum()
    time_s += roofline.fixed_s(layout, geometry, device, workload, phase)
    assert 0.15 * 700 * time_s < spent < 1.5 * energy.limit_j(time_s, device)
