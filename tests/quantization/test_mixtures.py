"""Mixtures within a tensor: what is ranked first gets the finer format, and bytes are exact."""

import numpy as np
import pytest
import torch

from quantization.formats import FORMATS
from quantization.quantizers import QUANTIZERS
from quantization.statistics import SiteStatistics
from search.exact import solve
from search.problem import Problem

RTN = QUANTIZERS["rtn"]
SHAPE = (96, 640)
MIXTURES = [n for n in FORMATS if FORMATS[n].family == "mixture" and not FORMATS[n].refusal(SHAPE)]
KINDS = ["owq", "atom", "slim", "mixllm", "fgmp"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def known():
    """Inputs with a few loud channels, and a Fisher information with a few loud rows."""
    loud = torch.rand(SHAPE[1], generator=generator(1)) ** 6 * 20 + 0.1
    x = torch.randn(2000, SHAPE[1], generator=generator(2)) * loud
    moment = x.T @ x / len(x)
    rows = torch.rand(SHAPE[0], 1, generator=generator(3)) ** 6
    return SiteStatistics(moment, moment.diagonal().clone(), rows.expand(SHAPE).clone())


@pytest.fixture(scope="module")
def weight():
    return torch.randn(SHAPE, generator=generator())


def test_there_is_one_of_each_kind():
    assert {name.partition("-")[0].partition("@")[0] for name in MIXTURES} == set(KINDS)


@pytest.mark.parametrize("quantizer", ["rtn", "rtn-weighted", "gptq"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_packing_are_exact(kind, quantizer, weight, known):
    for name in [n for n in MIXTURES if n.startswith(kind)][::4]:
        q = QUANTIZERS[quantizer].quantize(weight, FORMATS[name], known)
        packed = q.pack()
        assert packed.nbytes == FORMATS[name].nbytes(SHAPE)
        assert torch.equal(FORMATS[name].decode(*FORMATS[name].unpack(packed)), q.dequantize())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_experts_have_an_order_each(kind):
    weight = torch.randn(3, *SHAPE, generator=generator())
    name = next(n for n in MIXTURES if n.startswith(kind))
    q = RTN.quantize(weight, FORMATS[name])
    each = torch.stack([RTN.quantize(w, FORMATS[name]).dequantize() for w in weight])
    assert torch.equal(q.dequantize(), each)
    assert q.pack().nbytes == FORMATS[name].nbytes(weight.shape)


def output_error(weight, quantized, known):
    error = quantized - weight
    return float(((error @ known.second_moment) * error).sum())


@pytest.mark.parametrize(
    "names",
    [
        ["int3-g64", "owq-int3-g64@1%", "owq-int3-g64@5%", "bf16"],
        ["int3-g64", "atom-int3-g64@3%", "atom-int3-g64@25%", "int8-g64"],
    ],
)
def test_more_columns_kept_err_less(names, weight, known):
    found = [
        output_error(weight, RTN.quantize(weight, FORMATS[n], known).dequantize(), known)
        for n in names
    ]
    assert found == sorted(found, reverse=True)


def test_ranked_columns_beat_random_ones(weight, known):
    """The ranking by H_jj times the column's error is what earns OWQ its keep."""
    blind = SiteStatistics(importance=torch.rand(SHAPE[1], generator=generator(9)))
    errors = [
        output_error(
            weight, RTN.quantize(weight, FORMATS["owq-int3-g64@5%"], s).dequantize(), known
        )
        for s in (known, blind)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_the_loudest_column_stays_exact(weight, known):
    q = RTN.quantize(weight, FORMATS["owq-int3-g64@0.5%"], known)
    loudest = int(known.importance.argmax())
    assert torch.equal(q.dequantize()[:, loudest], weight[:, loudest].bfloat16().float())


def test_the_most_informative_rows_get_eight_bits(weight, known):
    fine = RTN.quantize(weight, FORMATS["int8-g64"]).dequantize()
    q = RTN.quantize(weight, FORMATS["mixllm-int4-g64-asym@10%"], known).dequantize()
    rows = (q == fine).all(-1)
    assert rows.sum() == round(0.1 * SHAPE[0])
    assert known.fisher[rows, 0].min() > known.fisher[:, 0].median()


def test_slim_gives_as_many_groups_a_bit_as_it_takes_from(weight, known):
    q = RTN.quantize(weight, FORMATS["slim-int3-g64@20%"], known).dequantize()
    groups = {
        bits: (q == RTN.quantize(weight, FORMATS[f"int{bits}-g64"]).dequantize())
        .all(0).unflatten(-1, (-1, 64)).all(-1).sum().item()
        for bits in (2, 3, 4)
    }  # fmt: skip
    assert groups == {2: 2, 3: 6, 4: 2}


def test_fgmp_has_its_share_of_fp8_blocks(weight, known):
    q = RTN.quantize(weight, FORMATS["fgmp@30%"], known)
    assert q.grid["mask"].sum() == round(0.3 * weight.numel() / 16)

    def error(name):
        values = RTN.quantize(weight, FORMATS[name], known).dequantize()
        return ((values - weight) ** 2 * known.fisher).sum()

    assert error("nvfp4") > error("fgmp@10%") > error("fgmp@50%") > error("fgmp@90%")


def test_a_part_without_slices_is_refused():
    assert "would get none" in FORMATS["owq-int4-g64@0.5%"].refusal((64, 64))


def test_choosing_fractions_is_ranking_rows_over_the_whole_model(weight):
    """MixLLM ranks the rows of all layers together; the search gets there by choosing fractions.

    Two units, one with ten times the Fisher information. As many fine rows as the solver's map has,
    taken by the gain of each row over both, lose nearly as much; the same fraction everywhere, more.
    """
    rng = generator(5)
    fishers = [torch.rand(SHAPE[0], 1, generator=rng) ** 3 * scale for scale in (1.0, 10.0)]
    names = ["int3-g64-asym", *(f"mixllm-int3-g64-asym@{p}%" for p in (5, 10, 20, 40)), "int8-g64"]
    known = [SiteStatistics(fisher=fisher.expand(SHAPE)) for fisher in fishers]
    rows = torch.stack([
        torch.stack([
            ((RTN.quantize(weight, FORMATS[name], k).dequantize() - weight) ** 2 * k.fisher).sum(-1)
            for name in names
        ])
        for k in known
    ])  # fmt: skip
    loss = rows.sum(-1).double().numpy()
    fine = [sum((rows[0, i] != rows[0, 0]).tolist()) for i in range(len(names))]
    costs = np.tile(np.array(fine, dtype=np.int64), (2, 1))
    budget = 2 * fine[3]
    solution = solve(Problem(loss, {"rows": costs}, np.ones_like(loss, bool)), {"rows": budget})
    chosen = loss[np.arange(2), np.array(solution.choice)].sum()
    gains = (rows[:, 0] - rows[:, -1]).flatten().sort(descending=True).values
    ranked = float(loss[:, 0].sum() - gains[:budget].sum())
    uniform = loss[:, 3].sum()
    assert chosen < 0.9 * uniform
    assert chosen < 1.15 * ranked
