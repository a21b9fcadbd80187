"""DialectFP4's published figures, k-means against the true optimum, outliers kept aside."""

import numpy as np
import pytest
import torch

from quantization.formats import FORMATS
from quantization.formats.dialect import DIALECTS, DialectFP4, _by_counts, _by_error
from quantization.formats.row_tables import weighted_kmeans
from quantization.quantizers import QUANTIZERS
from quantization.statistics import SiteStatistics

RTN = QUANTIZERS["rtn"]
SAMPLES = 32 * 8192


def draws(kind):
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.standard_normal, "laplace": lambda n: rng.laplace(size=n),
        "t5": lambda n: rng.standard_t(5, size=n),
    }[kind](SAMPLES)  # fmt: skip
    return torch.tensor(values, dtype=torch.float32).view(-1, 1024)


def decibels(name, weight):
    error = RTN.quantize(weight, FORMATS[name]).dequantize() - weight
    return 10 * torch.log10(weight.square().sum() / error.square().sum()).item()


@pytest.mark.parametrize(
    ("kind", "exact", "online", "mxfp4", "int4"),
    [
        ("normal", 20.66, 20.29, 18.79, 20.24),
        ("laplace", 19.94, 19.60, 17.95, 18.32),
        ("t5", 19.93, 19.59, 17.93, 18.19),
    ],
)
def test_signal_to_noise_of_blocks_of_32(kind, exact, online, mxfp4, int4):
    """Figures measured once with an independent implementation, to a tenth of a decibel."""
    weight = draws(kind)
    assert decibels("dialectfp4-b32", weight) == pytest.approx(exact, abs=0.1)
    assert decibels("dialectfp4-b32-online", weight) == pytest.approx(online, abs=0.1)
    assert decibels("mxfp4", weight) == pytest.approx(mxfp4, abs=0.1)
    assert decibels("int4-g32", weight) == pytest.approx(int4, abs=0.1)


def test_the_exact_choice_is_the_best_of_all_sixteen():
    h = torch.rand(500, 32, generator=torch.Generator().manual_seed(0)) * 8
    h[:, 0] = 8 + 8 * torch.rand(500, generator=torch.Generator().manual_seed(1))
    errors = torch.stack([(h[..., None] - d).abs().amin(-1).square().sum(-1) for d in DIALECTS])
    best = errors.gather(0, _by_error(h)[None])[0]
    assert torch.allclose(best, errors.amin(0), rtol=1e-5)


def test_two_stages_pick_by_counting():
    """A maximum of 13 half units leaves dialects 4 and 5: real [4.5, 5.75) against [3.5, 4.5)."""
    low, high = [7.5, 8.5], [9.5, 10.5]  # half units inside each range
    for block, dialect in (([13.0, *high, *high, *low], 4), ([13.0, *high, *low, *low], 5)):
        padded = torch.tensor([block + [1.0] * (32 - len(block))])
        assert _by_counts(padded).item() == dialect


def test_smaller_blocks_err_less():
    weight = draws("laplace")
    found = [decibels(DialectFP4(block).name, weight) for block in (64, 32, 16)]
    assert found == sorted(found)


def optimal_clusters(values, weights, clusters):
    """The least weighted squared error, by dynamic programming over the sorted values."""
    order = np.argsort(values)
    x, w = values[order], weights[order]
    n = len(x)
    sums = [np.concatenate([[0], np.cumsum(w * x**p)]) for p in range(3)]

    def cost(a, b):
        mass, first, second = (s[b] - s[a] for s in sums)
        return second - first**2 / mass if mass else 0.0

    table = np.full((clusters + 1, n + 1), np.inf)
    table[0, 0] = 0
    for k in range(1, clusters + 1):
        for b in range(1, n + 1):
            table[k, b] = min(table[k - 1, a] + cost(a, b) for a in range(b))
    return table[clusters, n]


def test_kmeans_comes_close_to_the_optimum():
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal((6, 60)), rng.gamma(1.0, size=(6, 60))
    centres = weighted_kmeans(torch.tensor(values), torch.tensor(weights), 8).numpy()
    distance = np.abs(values[:, :, None] - centres[:, None, :]).min(-1) ** 2
    found = (weights * distance).sum(-1)
    best = [optimal_clusters(v, w, 8) for v, w in zip(values, weights, strict=True)]
    assert (found >= np.array(best) * 0.999).all()
    assert found.sum() <= 1.25 * sum(best)  # Lloyd's is a local search


def test_tables_go_where_the_fisher_information_is():
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    fisher = torch.rand(16, 512, generator=torch.Generator().manual_seed(1)) ** 8
    errors = {}
    for name, known in (("plain", SiteStatistics()), ("weighted", SiteStatistics(fisher=fisher))):
        error = RTN.quantize(weight, FORMATS["squeezellm3"], known).dequantize() - weight
        errors[name] = (fisher * error.square()).sum()
    assert errors["weighted"] < 0.9 * errors["plain"]


@pytest.mark.parametrize("dense", ["squeezellm4", "int4-g64"])
def test_outliers_are_kept_to_float16_and_free_the_rest(dense):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    weight.view(-1)[::1000] = 1.0
    sparse = RTN.quantize(weight, FORMATS[f"{dense}@0.45%"])
    plain = RTN.quantize(weight, FORMATS[dense])
    assert torch.equal(sparse.dequantize().view(-1)[::1000], weight.view(-1)[::1000])
    rest = weight.abs() < 1
    errors = [(q.dequantize() - weight)[rest].norm() for q in (sparse, plain)]
    assert errors[0] < errors[1]
    assert sparse.grid["outlier_values"].shape == (round(0.0045 * weight.numel()),)


def test_the_most_sensitive_weights_are_outliers_whatever_their_size():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    fisher = torch.ones_like(weight)
    weight[5, 7], fisher[5, 7] = 0.123, 1e6
    q = RTN.quantize(weight, FORMATS["squeezellm3@0.45%"], SiteStatistics(fisher=fisher))
    assert 5 * 256 + 7 in q.grid["outlier_places"].tolist()
