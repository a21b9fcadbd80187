"""Quantizers: each beats what it builds on, in its own measure, and GPTQ is GPTQ."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from quantization.errors import QuantizationError
from quantization.formats import FORMATS
from quantization.quantizers import QUANTIZERS, needs
from quantization.quantizers.autoround import AutoRound
from quantization.quantizers.gptq import GPTQ, inverse_factor
from quantization.quantizers.yaqa import YAQA, unit_lower
from quantization.statistics import SiteStatistics

BLOCK = 64  # of rows whose curvature is known
SCALAR = [
    "int2-g64", "int3-g64-asym", "int4-g128", "int4-g32-asym-fp8", "int4-g64-real", "int8-channel",
    "int3-g16-asym-spqr", "ternary-g64", "int4-g64-e8m0", "int4-g64-asym-fp8", "fp4-e2m1-g32", "fp8-e4m3-b128", "mxfp4", "mxfp6", "nvfp4",
    "nf4-g64", "squeezellm3", "squeezellm4@0.45%", "dialectfp4-b32", "fgmp@30%",
    "owq-int3-g64@5%", "atom-int3-g64@12%", "slim-int3-g64@20%", "mixllm-int3-g64-asym@10%",
]  # fmt: skip


def data(rows=64, columns=320, seed=0):
    """A heavy-tailed weight and the statistics of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    mixing *= torch.rand(columns, generator=generator) ** 2
    x = torch.randn(2000, columns, generator=generator) @ mixing
    moment = x.T @ x / len(x)
    weight = torch.randn(rows, columns, generator=generator) ** 3 * 0.01
    fisher = torch.rand(rows, columns, generator=generator)
    return weight, SiteStatistics(moment, moment.diagonal().clone(), fisher)


def output_error(name, format, weight, known):
    error = QUANTIZERS[name].quantize(weight, FORMATS[format], known).dequantize() - weight
    return float(((error @ known.second_moment) * error).sum())


@pytest.mark.parametrize("format", SCALAR)
def test_gptq_beats_rounding_on_every_scalar_format(format):
    weight, known = data()
    gptq, plain = (output_error(name, format, weight, known) for name in ("gptq", "rtn-weighted"))
    assert gptq < 0.95 * plain


def reference_gptq(weight, moment, damping, order, rounded):
    """Algorithm 1 of arXiv 2210.17323 as it stands: the inverse itself, one column at a time."""
    weight, moment = weight.double().clone(), moment.double()
    moment = moment + damping * moment.diagonal().mean() * torch.eye(len(moment))
    result, remaining = torch.zeros_like(weight), list(order)
    while remaining:
        inverse = torch.linalg.inv(moment[remaining][:, remaining])
        j = remaining[0]
        result[:, j] = rounded(weight[:, j], j)
        error = (weight[:, j] - result[:, j]) / inverse[0, 0]
        weight[:, remaining[1:]] -= error[:, None] * inverse[0, 1:]
        remaining = remaining[1:]
    return result


@pytest.mark.parametrize(
    "format", ["int4-g32", "int3-g32-asym", "fp4-e2m1-g32", "nf4-g32", "squeezellm3"]
)
@pytest.mark.parametrize("activation_order", [False, True])
def test_gptq_is_within_two_percent_of_the_textbook(format, activation_order):
    weight, known = data(24, 96)
    weight = weight.contiguous()
    own = GPTQ(activation_order=activation_order).quantize(weight, FORMATS[format], known)
    order = torch.arange(96)
    if activation_order:
        order = known.importance.argsort(descending=True)

    def rounded(column, j):
        grid = FORMATS[format].take(own.grid, torch.tensor([j]), 96)
        codes = FORMATS[format].encode(column[:, None].float().contiguous(), grid)
        return FORMATS[format].decode(codes, grid)[:, 0].double()

    textbook = reference_gptq(weight, known.second_moment, 0.01, order.tolist(), rounded)
    errors = [
        float(((d @ known.second_moment) * d).sum())
        for d in (own.dequantize() - weight, textbook.float() - weight)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def curved(rows=64, columns=320, seed=0, block=BLOCK):
    """`data` with curvatures whose outputs are as correlated as its inputs."""
    weight, known = data(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    blocks = -(-rows // block)
    y = torch.randn(blocks, 500, block, generator=generator)
    y = y @ torch.randn(blocks, block, block, generator=generator)
    y[-1, :, (rows - 1) % block + 1 :] = 0  # a short block is filled up
    x = torch.randn(2000, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    curvature = {"input_curvature": x.T @ x / 2000, "output_curvature": y.mT @ y / 500}
    return weight, replace(known, **curvature)


@pytest.mark.parametrize(
    "format", ["int4-g64", "nvfp4", "squeezellm3", "fgmp@30%", "owq-int3-g64@5%"]
)
@pytest.mark.parametrize("quantizer", ["gptq", "yaqa"])
def test_a_stack_of_experts_is_quantized_as_its_matrices(format, quantizer):
    each = [curved(seed=seed) for seed in range(3)]
    known = SiteStatistics(
        **{
            f.name: torch.stack([getattr(k, f.name) for _, k in each])
            for f in fields(SiteStatistics)
            if f.init
        }
    )
    gptq = QUANTIZERS[quantizer]
    stacked = gptq.quantize(torch.stack([w for w, _ in each]), FORMATS[format], known)
    for i, (weight, own) in enumerate(each):
        alone = gptq.quantize(weight, FORMATS[format], own).dequantize()
        agree = (stacked.dequantize()[i] == alone).float().mean()
        assert agree > 0.99  # float32 sums in another order tip a few values over


def two_sided_loss(quantized, weight, known):
    """tr(G E H E^T) under the mean of the second moment and the inputs' curvature."""
    error = quantized.dequantize() - weight
    parts = (known.second_moment, known.input_curvature)
    moment = sum(part / part.diagonal().mean() for part in parts)
    total = 0.0
    height = known.output_curvature.shape[-1]
    for block, own in zip(known.output_curvature, error.split(height), strict=True):
        g = block[: len(own), : len(own)]
        total += float((g @ own @ moment * own).sum())
    return total


@pytest.mark.parametrize(
    "format", [name for name in SCALAR if FORMATS[name].rowwise and not name.startswith("mxfp6")]
)
def test_yaqa_loses_less_than_gptq_where_rows_curve_together(format):
    weight, known = curved()
    yaqa, gptq = (
        two_sided_loss(QUANTIZERS[n].quantize(weight, FORMATS[format], known), weight, known)
        for n in ("yaqa", "gptq")
    )
    assert yaqa < 0.85 * gptq


def reference_yaqa(weight, inputs, outputs, rounded):
    """tr(G E H E^T) one value at a time, with the very sums of its two factorisations."""
    rows, columns = weight.shape
    order = inputs.diagonal().argsort(descending=True)
    backwards = order.flip(0)
    upper = unit_lower(inputs[backwards][:, backwards], 0.01).flip(0, 1)
    whole = torch.block_diag(*outputs)[:rows, :rows]
    means = [b.diagonal()[b.diagonal() != 0].mean() for b in outputs]
    damping = torch.cat([m.expand(len(b)) for m, b in zip(means, outputs, strict=True)])[:rows]
    down = whole.diagonal().argsort()
    lower = unit_lower((whole + damping.diag())[down][:, down], 0.0)
    weight = weight[down]
    error, passed = torch.zeros(2, rows, columns, dtype=torch.float64)
    for i in reversed(range(rows)):
        for j in range(columns):
            below = lower[i + 1 :, i] @ error[i + 1 :, j]
            before = passed[i, :j] @ upper[:j, j]
            exact = float(weight[i, order[j]])
            place = int(down[i]), int(order[j])
            error[i, j] = rounded(exact - float(below + before), place) - exact
            passed[i, j] = error[i, j] + below
    return (weight + error[:, order.argsort()])[down.argsort()], int(down[-1])


@pytest.mark.parametrize(
    ("format", "block"),
    [("int4-g32", 64), ("int3-g32-asym", 64), ("nf4-g32", 64), ("int4-g32", 150)],
)
def test_yaqa_is_its_recurrence(format, block):
    """Over short last blocks and tiles of rows and columns; a block of several tiles of rows, too."""
    weight, known = curved(80 if block == 64 else 150, 96, block=block)
    own = YAQA().quantize(weight, FORMATS[format], known)
    grid = {name: tensor.clone() for name, tensor in own.grid.items()}

    def rounded(value, place):
        row, column = place
        single = {name: tensor[row : row + 1] for name, tensor in grid.items()}
        taken = FORMATS[format].take(single, torch.tensor([column]), 96)
        codes = FORMATS[format].encode(torch.tensor([[value]]), taken)
        return float(FORMATS[format].decode(codes, taken))

    parts = (known.second_moment, known.input_curvature)
    moment = sum(part / part.diagonal().mean() for part in parts)
    slow, first = reference_yaqa(weight, moment, known.output_curvature, rounded)
    agree = (slow.float() - own.dequantize()).abs() < 1e-5
    assert agree.float().mean() > 0.9  # one value that tips over moves those after it
    assert agree[first].float().mean() > 0.99  # the first row that is rounded
    error = slow - weight
    fast = two_sided_loss(own, weight, known)
    assert fast == pytest.approx(
        sum(
            float((g[: len(e), : len(e)].double() @ e @ moment.double() * e).sum())
            for g, e in zip(known.output_curvature, error.split(block), strict=True)
        ),
        rel=0.03,
    )


@pytest.mark.parametrize("format", ["int4-g64", "squeezellm3", "fp8-e4m3-b128", "owq-int3-g64@5%"])
def test_yaqa_without_curvature_is_gptq(format):
    weight, known = data()
    values = [
        QUANTIZERS[n].quantize(weight, FORMATS[format], known).dequantize()
        for n in ("yaqa", "gptq")
    ]
    assert torch.equal(*values)


@pytest.mark.parametrize("format", [*SCALAR, "trellis3"])
@pytest.mark.parametrize("quantizer", ["gptq", "yaqa"])
def test_values_find_their_codes_on_the_grid_alone(format, quantizer):
    """Exports read a bank's values: nothing has to be fed back a second time."""
    weight, known = data(columns=256)
    moment = known.second_moment.clone()
    moment[:5] += 0.01 * moment[5:10]  # another sum than the plain one
    known = replace(known, input_curvature=(moment + moment.T) / 2)
    made = QUANTIZERS[quantizer].quantize(weight, FORMATS[format], known)
    grid = QUANTIZERS[quantizer].grid(weight, FORMATS[format], known)
    codes = FORMATS[format].encode(made.dequantize(), grid)
    assert torch.equal(FORMATS[format].decode(codes, grid), made.dequantize())


def test_yaqa_with_outputs_that_do_not_curve_together_is_gptq():
    weight, known = curved()
    flat = torch.eye(BLOCK)[None]
    known = replace(known, input_curvature=known.second_moment, output_curvature=flat)
    values = [
        QUANTIZERS[n].quantize(weight, FORMATS["int4-g64"], known).dequantize()
        for n in ("yaqa", "gptq")
    ]
    assert (values[0] == values[1]).float().mean() > 0.99


@pytest.mark.parametrize("quantizer", ["gptq", "yaqa", "autoround", "rtn-weighted"])
@pytest.mark.parametrize("shape", [(8, 256), (3, 8, 256)])
def test_formats_that_round_by_themselves_are_left_to_do_so(quantizer, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    own = QUANTIZERS[quantizer].quantize(weight, FORMATS["gguf-q4_K"])
    plain = QUANTIZERS["rtn"].quantize(weight, FORMATS["gguf-q4_K"])
    assert torch.equal(own.codes, plain.codes)


def test_yaqa_gives_such_formats_the_curvature_and_keeps_an_imported_importance():
    weight, known = curved(64, 256)
    plain = QUANTIZERS["gptq"].quantize(weight, FORMATS["gguf-q4_K"], known)
    guided = YAQA().quantize(weight, FORMATS["gguf-q4_K"], known)
    assert not torch.equal(plain.codes, guided.codes)
    imported = replace(
        known, importance=torch.rand(256, generator=torch.Generator().manual_seed(1))
    )
    plain = QUANTIZERS["gptq"].quantize(weight, FORMATS["gguf-q4_K"], imported)
    guided = YAQA().quantize(weight, FORMATS["gguf-q4_K"], imported)
    assert torch.equal(plain.codes, guided.codes)


def test_yaqa_stands_inputs_and_outputs_that_were_never_seen():
    weight, known = curved()
    unseen = SiteStatistics(
        **{
            f.name: torch.zeros_like(t)
            for f in fields(known)
            if f.init and (t := getattr(known, f.name)) is not None
        }
    )
    assert YAQA().quantize(weight, FORMATS["int4-g64"], unseen).dequantize().isfinite().all()


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse():
    _, known = data()
    upper = inverse_factor(known.second_moment, 0.01)
    moment = known.second_moment.double()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(len(moment)).double(), atol=1e-6)
    assert torch.equal(upper, upper.triu())


def test_inputs_that_are_always_zero_harm_nothing():
    weight, known = data()
    moment = known.second_moment.clone()
    moment[:, :7] = moment[:7] = 0
    dead = SiteStatistics(moment, moment.diagonal().clone())
    values = QUANTIZERS["gptq"].quantize(weight, FORMATS["int4-g64"], dead).dequantize()
    assert values.isfinite().all()
    unseen = SiteStatistics(torch.zeros_like(moment), torch.zeros(len(moment)))
    assert (
        QUANTIZERS["gptq"]
        .quantize(weight, FORMATS["int4-g64"], unseen)
        .dequantize()
        .isfinite()
        .all()
    )


def test_a_moment_that_is_no_second_moment_is_refused():
    weight, known = data(8, 64)
    broken = SiteStatistics(-torch.eye(64) + 2, torch.ones(64))
    with pytest.raises(QuantizationError, match="calibrate with more text"):
        QUANTIZERS["gptq"].quantize(weight, FORMATS["int4-g64"], broken)


@pytest.mark.parametrize(
    "format", ["int3-g64", "int4-g64-asym", "fp4-e2m1-g32", "nvfp4", "fp8-e4m3-b128", "ternary-g64"]
)
def test_clipping_is_never_worse_than_rounding_in_its_own_measure(format):
    weight, known = data()
    plain, mse, weighted = (
        QUANTIZERS[n].quantize(weight, FORMATS[format], known).dequantize() - weight
        for n in ("rtn", "rtn-mse", "rtn-weighted")
    )
    cost = known.importance
    assert mse.square().sum() <= plain.square().sum()
    assert (weighted.square() * cost).sum() <= (mse.square() * cost).sum()


@pytest.mark.parametrize("format", ["squeezellm3", "owq-int3-g64@5%"])
def test_what_a_format_needs_reaches_it_under_any_quantizer(format):
    """The clipping search by plain squared error weighs no weight, but places a mixture's parts."""
    weight, known = data()
    assert known.importance is not None
    blind = QUANTIZERS["rtn-mse"].quantize(weight, FORMATS[format]).dequantize() - weight
    seeing = QUANTIZERS["rtn-mse"].quantize(weight, FORMATS[format], known).dequantize() - weight
    cost = known.fisher if format == "squeezellm3" else known.importance
    assert (seeing.square() * cost).sum() < (blind.square() * cost).sum()


def test_layers_together_are_quantized_as_each_alone():
    """Also those that no input reached; what is remembered of the moments serves every format."""
    each = [data(seed=seed) for seed in range(4)]
    statistics = [known for _, known in each[:3]] + [SiteStatistics()]
    gptq = GPTQ()
    for format in ("int4-g64-asym", "mxfp4", "owq-int3-g64@5%"):
        together = gptq.quantize_alike([w for w, _ in each], FORMATS[format], statistics)
        for q, (weight, _), known in zip(together, each, statistics, strict=True):
            fresh = SiteStatistics(known.second_moment, known.importance, known.fisher)
            alone = gptq.quantize(weight, FORMATS[format], fresh).dequantize()
            assert (q.dequantize() == alone).float().mean() > 0.99


@pytest.mark.parametrize(
    "format", ["int3-g64", "int4-g64-asym", "int4-g64-real", "int2-g32-real", "nf4-g64"]
)
def test_hqq_lowers_the_norm_that_it_minimises(format):
    weight, _ = data()
    plain, found = (
        (QUANTIZERS[n].quantize(weight, FORMATS[format]).dequantize() - weight).abs()
        for n in ("rtn", "hqq")
    )
    assert (found**0.7).sum() < (plain**0.7).sum()


@pytest.mark.parametrize("format", ["int3-g64", "int4-g64-asym", "mxfp4", "nf4-g64"])
def test_autoround_lowers_the_output_error_of_its_grid(format):
    weight, known = data()
    assert output_error("autoround", format, weight, known) < 0.98 * output_error(
        "rtn-weighted", format, weight, known
    )


def test_autoround_rounds_each_weight_to_a_neighbour():
    weight, known = data()
    q = AutoRound(steps=50).quantize(weight, FORMATS["int4-g64"], known)
    steps = q.format.spread(q.grid["scales"].float(), weight)
    inside = (weight / steps).abs() < 7
    assert ((q.dequantize() - weight).abs() <= steps * 1.001)[inside].all()


@pytest.mark.parametrize("name", list(QUANTIZERS))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    format=st.sampled_from(["bf16", *SCALAR]),
    rows=st.integers(1, 4),
    columns=st.sampled_from([1, 7, 16, 64, 130]),
    kind=st.sampled_from(["normal", "zero", "subnormal", "one", "tiny", "huge", "extreme"]),
    calibrated=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_odd_weights_give_finite_values_or_a_clear_refusal(
    name, format, rows, columns, kind, calibrated, seed
):
    assume(FORMATS[format].refusal((rows, columns)) is None)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight = {
        "normal": weight, "zero": weight * 0, "subnormal": weight * 1e-41, "tiny": weight * 1e-12,
        "one": torch.where(weight == weight.max(), weight, 0.0), "huge": weight * 1e9, "extreme": weight.clamp(-1, 1) * 3e38,
    }[kind]  # fmt: skip
    before = weight.clone()
    known = SiteStatistics()
    if calibrated:
        x = torch.randn(5, columns, generator=generator)  # singular
        moment = x.T @ x
        known = SiteStatistics(moment, moment.diagonal().clone(), torch.rand(rows, columns))
    quantizer = AutoRound(steps=5) if name == "autoround" else QUANTIZERS[name]
    try:
        q = quantizer.quantize(weight, FORMATS[format], known)
    except QuantizationError as error:
        assert kind in ("huge", "extreme")
        assert "keep this layer in bf16" in str(error)
        return
    assert torch.equal(weight, before)
    assert q.dequantize().isfinite().all()
    assert q.pack().nbytes == FORMATS[format].nbytes((rows, columns))
    if kind == "zero":
        assert q.dequantize().abs().max() < 1e-6


@pytest.mark.parametrize("name", list(QUANTIZERS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_all(name, bad):
    weight = torch.ones(2, 64)
    weight[1, 3] = bad
    with pytest.raises(QuantizationError, match="1 of 128 weights"):
        QUANTIZERS[name].quantize(weight, FORMATS["int4-g32"])


@pytest.mark.parametrize(
    ("quantizer", "other"),
    [(GPTQ(), GPTQ(damping=0.5)), (GPTQ(), GPTQ(activation_order=False)),
     (AutoRound(), AutoRound(steps=1))],
)  # fmt: skip
def test_settings_are_part_of_the_identity(quantizer, other):
    assert quantizer.identity != other.identity


def test_what_is_needed_is_said():
    assert needs(QUANTIZERS["rtn"], FORMATS["int4-g64"]) == set()
    assert needs(QUANTIZERS["gptq"], FORMATS["int4-g64"]) == {"second-moment"}
    assert needs(QUANTIZERS["rtn"], FORMATS["squeezellm4"]) == {"fisher"}
