"""Estimators against their definitions, on models small enough to compute them directly."""

import numpy as np
import pytest
import torch

from evaluation.assembly import AssembledModel
from evaluation.calibration import backward_of_samples
from evaluation.evaluator import Evaluator
from quantization.schemes import Scheme
from sensitivity import ESTIMATORS, Share, menu, merge
from tests.conftest import choices_of

CPU = torch.device("cpu")
CHUNKS = np.random.default_rng(1).integers(2, 300, (4, 24))
ALONE = ("context-marginal", "shapley")  # each share has a random context of its own


def whole(name, model, choices, chunks=CHUNKS):
    estimator = ESTIMATORS[name]
    shares = estimator.shares(len(choices), len(chunks))
    return merge(estimator.score(model, chunks, choices, share) for share in shares)


def unshrunk(table):
    """Sums with experts as they were measured."""
    sums = table.sums.copy()
    for unit, experts in table.experts.items():
        sums[unit] += experts.sums.sum(axis=1)
    return sums


@pytest.fixture(params=["llama", "mixtral", "gpt_oss"])
def model(request, make_bank):
    return AssembledModel(make_bank(request.param), CPU)


def inside(layout):
    return [site for unit in layout.units for site in unit.stored if unit.layer is not None]


def by_gradients(model, choices, gradients_of, score):
    """Tables from plain backward passes: `score` of a unit's gradients and errors, summed."""
    layout = model.bank.layout
    model.assign(None)
    expected = np.zeros((len(choices), len(menu(choices))))
    for site in inside(layout):
        model.parameter(site.parameter).requires_grad_(True)
    for index in range(len(CHUNKS)):
        gradients_of(index)
        for u, unit in enumerate(layout.units):
            for scheme in choices[u] if unit.layer is not None else []:
                pairs = []
                for site in unit.stored:
                    parameter = model.parameter(site.parameter)
                    dw = model.bank.tensors(unit, scheme)[site.parameter] - parameter.data
                    pair = parameter.grad.double(), dw.double()
                    pairs.append(tuple(t.mT for t in pair) if site.transposed else pair)
                expected[u, menu(choices).index(scheme)] += score(pairs)
        for site in inside(layout):
            model.parameter(site.parameter).grad = None
    for site in inside(layout):
        model.parameter(site.parameter).requires_grad_(False)
    return expected


def check(table, expected, rel=1e-4):
    sums = unshrunk(table)
    offered = ~np.isnan(sums)
    assert sums[offered] == pytest.approx(expected[offered], rel=rel)


def test_output_error_is_the_squared_change_of_the_outputs(make_bank):
    """E || x dW^T ||^2 with x caught by an ordinary hook."""
    model = AssembledModel(make_bank("llama"), CPU)
    layout, choices = model.bank.layout, choices_of(model.bank.layout)
    found = whole("output-error", model, choices).mean()
    model.assign(None)
    for u, unit in enumerate(layout.units):
        for scheme in choices[u] if unit.layer is not None else []:
            expected = 0.0
            for site in unit.sites:
                inputs = []
                module = model.module.get_submodule(site.name)
                handle = module.register_forward_pre_hook(lambda _, a: inputs.append(a[0]))  # noqa: B023
                with torch.inference_mode():
                    for ids in CHUNKS:
                        model.module(torch.from_numpy(ids)[None])
                handle.remove()
                dw = model.bank.tensors(unit, scheme)[site.parameter] - module.weight
                expected += sum((x @ dw.T).double().square().sum().item() for x in inputs)
            column = menu(choices).index(scheme)
            assert found[u, column] == pytest.approx(expected / CHUNKS.size, rel=1e-4)


def test_output_error_reaches_packed_experts(model):
    """The sum over an experts unit equals the outputs' change, token by routed token."""
    choices = choices_of(model.bank.layout)
    table = whole("output-error", model, choices)
    kinds = [unit.kind for unit in model.bank.layout.units]
    for u, kind in enumerate(kinds):
        offered = ~np.isnan(table.sums[u])
        if kind in ("linear", "experts"):
            assert (table.mean()[u][offered] > 0).all()


def test_fisher_is_half_the_squared_gradient_times_the_squared_error(model):
    choices = choices_of(model.bank.layout)
    expected = by_gradients(
        model,
        choices,
        lambda i: backward_of_samples(model.module, CHUNKS[i], seed=1000 * i),
        lambda pairs: sum(0.5 * (g**2 * dw**2).sum().item() for g, dw in pairs),
    )
    check(whole("fisher", model, choices), expected)


def test_row_fisher_squares_the_sums_over_rows(model):
    choices = choices_of(model.bank.layout)
    expected = by_gradients(
        model,
        choices,
        lambda i: backward_of_samples(model.module, CHUNKS[i], seed=1000 * i),
        lambda pairs: sum(0.5 * (g * dw).sum(-1).square().sum().item() for g, dw in pairs),
    )
    check(whole("row-fisher", model, choices), expected)


def test_kl_fisher_squares_the_sum_over_a_unit(make_bank):
    """All sites of a unit together, and two probes of different seeds."""
    model = AssembledModel(make_bank("llama"), CPU)
    choices = choices_of(model.bank.layout)
    expected = sum(
        by_gradients(
            model,
            choices,
            lambda i: backward_of_samples(model.module, CHUNKS[i], seed=1000 * i + probe),  # noqa: B023
            lambda pairs: 0.25 * sum((g * dw).sum().item() for g, dw in pairs) ** 2,
        )
        for probe in range(2)
    )
    check(whole("kl-fisher", model, choices), expected, rel=1e-3)


def test_mixllm_takes_the_texts_labels_and_the_first_order(make_bank):
    model = AssembledModel(make_bank("llama"), CPU)
    choices = choices_of(model.bank.layout)

    def backward(index):
        ids = torch.from_numpy(CHUNKS[index])
        logits = model.module(ids[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()

    def score(pairs):
        rows = [(g * dw).sum(-1) for g, dw in pairs]
        return sum((s + s**2 / 2).abs().sum().item() for s in rows)

    check(whole("mixllm", model, choices), by_gradients(model, choices, backward, score))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "cohere"])
def test_gradient_weighs_output_errors_by_the_losss_gradient(make_bank, family):
    """ModelOpt's form with outputs and their gradients caught by ordinary hooks."""
    model = AssembledModel(make_bank(family), CPU)
    layout, choices = model.bank.layout, choices_of(model.bank.layout)
    found = unshrunk(whole("gradient", model, choices))
    model.assign(None)
    seen = {}

    def hook(name):
        def forward(_, args, output):
            output.retain_grad()
            seen[name] = args[0], output

        return forward

    sites = inside(layout)
    model.parameter(sites[0].parameter).requires_grad_(True)  # so that there is a graph
    for site in sites:
        model.module.get_submodule(site.name).register_forward_hook(hook(site.name))
    expected = np.zeros_like(found)
    for ids in torch.from_numpy(CHUNKS):
        embedded = model.module.get_input_embeddings()(ids[None]).detach().requires_grad_()
        logits = model.module(inputs_embeds=embedded).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()
        for u, unit in enumerate(layout.units):
            for scheme in choices[u] if unit.layer is not None else []:
                for site in unit.stored:
                    x, y = seen[site.name]
                    dw = model.bank.tensors(unit, scheme)[site.parameter]
                    dw = dw - model.parameter(site.parameter).detach()
                    score = 0.5 * (y.grad.double() ** 2 * (x @ dw.T).double() ** 2).sum()
                    expected[u, menu(choices).index(scheme)] += score.item()
    offered = ~np.isnan(found)
    assert found[offered] == pytest.approx(expected[offered], rel=1e-3)


def measured(evaluator, schemes, chunks):
    return sum(evaluator.measure(schemes, ids).kl_sum for ids in chunks)


def at(layout, changes):
    """The float32 reference but for some units; its bank holds no bf16 beside the embedding's."""
    schemes = [None] * len(layout.units)
    for u, scheme in changes.items():
        schemes[u] = scheme
    return schemes


@pytest.fixture
def evaluator(make_bank):
    return Evaluator(make_bank("llama"), CPU)


def test_flips_are_what_the_evaluator_measures(evaluator):
    """Restarting a pass at the changed block changes nothing."""
    layout, choices = evaluator.bank.layout, choices_of(evaluator.bank.layout)
    table = whole("flips", evaluator.model, choices)
    for u in (1, 4, len(choices) - 2):
        for scheme in choices[u]:
            expected = measured(evaluator, at(layout, {u: scheme}), CHUNKS[:1])
            assert table.sums[u, menu(choices).index(scheme)] == pytest.approx(
                expected, rel=5e-3
            )  # of 1e-5 nats a token


def test_flips_from_a_quantized_base_add_up_to_the_base(evaluator):
    layout, choices = evaluator.bank.layout, choices_of(evaluator.bank.layout)
    table = whole("flips-quantized", evaluator.model, choices)
    base = {u: row[len(row) // 2] for u, row in enumerate(choices)}  # embedding and head in bf16
    column = menu(choices).index(base[4])
    level = measured(evaluator, at(layout, base), CHUNKS[:1])
    assert np.nansum(table.sums[:, column]) == pytest.approx(level, rel=1e-3)
    changed = measured(evaluator, at(layout, {**base, 4: choices[4][0]}), CHUNKS[:1])
    own = table.sums[4, menu(choices).index(choices[4][0])] - table.sums[4, column]
    assert own == pytest.approx(changed - level, rel=1e-2)


def test_marginals_of_a_walk_add_up_to_the_loss_of_its_ends(evaluator):
    """Efficiency: each uniform map's scores are its measured loss."""
    layout, choices = evaluator.bank.layout, choices_of(evaluator.bank.layout)
    table = whole("shapley", evaluator.model, choices)
    for column, scheme in enumerate(menu(choices)[1:], 1):
        uniform = {u: scheme for u, row in enumerate(choices) if len(row) > 1}
        expected = measured(evaluator, at(layout, uniform), CHUNKS[:2])
        assert np.nansum(table.sums[:, column]) == pytest.approx(expected, rel=1e-3)


def test_context_marginals_stand_on_a_quantized_upstream(evaluator):
    from sensitivity.context_marginal import random_context

    layout, choices = evaluator.bank.layout, choices_of(evaluator.bank.layout)
    share = Share((0, len(choices)), (0, 1))
    table = ESTIMATORS["context-marginal"].score(evaluator.model, CHUNKS, choices, share)
    context = random_context(choices, seed=0)
    u = next(u for u, unit in enumerate(layout.units) if unit.layer == 1)
    upstream = {i: context[i] for i in range(u) if layout.units[i].layer == 0}
    without = measured(evaluator, at(layout, upstream), CHUNKS[:1])
    within = [i for i, unit in enumerate(layout.units) if unit.layer == 1 and i != u]
    company = {**upstream, **{i: context[i] for i in within}}
    without = measured(evaluator, at(layout, company), CHUNKS[:1])
    for scheme in choices[u]:
        expected = measured(evaluator, at(layout, {**company, u: scheme}), CHUNKS[:1]) - without
        column = menu(choices).index(scheme)
        assert table.sums[u, column] == pytest.approx(expected, rel=2e-2, abs=1e-4 * without)


def test_higgs_is_linear_in_the_relative_squared_error(evaluator):
    """And right for noise like that which it was fitted on: KL is near quadratic in its size."""
    from sensitivity.base import squared_error

    layout, choices = evaluator.bank.layout, choices_of(evaluator.bank.layout)
    table = whole("higgs", evaluator.model, choices)
    evaluator.model.assign(None)
    for u in (1, 5):
        errors = [squared_error(evaluator.model, u, scheme) for scheme in choices[u]]
        rates = [
            table.sums[u, menu(choices).index(s)] / e
            for s, e in zip(choices[u], errors, strict=True)
        ]
        assert rates == pytest.approx([rates[0]] * len(rates), rel=1e-6)
        expected = measured(evaluator, at(layout, {u: choices[u][1]}), CHUNKS[:1])
        assert 0.4 < table.sums[u, menu(choices).index(choices[u][1])] / expected < 2.5


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_shares_add_up_to_the_whole(make_bank, name):
    model = AssembledModel(make_bank("llama"), CPU)
    choices = choices_of(model.bank.layout)
    shares = ESTIMATORS[name].shares(len(choices), len(CHUNKS))
    end = 1 if name in ALONE else max(share.chunks[1] for share in shares)
    in_one = ESTIMATORS[name].score(model, CHUNKS, choices, Share((0, len(choices)), (0, end)))
    cut = [Share(part, (c, c + 1)) for c in range(end) for part in ((0, 3), (3, len(choices)))]
    if name in ("shapley", "hessian-trace"):  # a walk, and a random direction, take all units
        cut = [Share((0, len(choices)), (c, c + 1)) for c in range(end)]
    if name == "weight-error":
        cut = [Share(part, (0, len(CHUNKS))) for part in ((0, 3), (3, len(choices)))]
    in_shares = merge(ESTIMATORS[name].score(model, CHUNKS, choices, share) for share in cut)
    assert in_shares.tokens == pytest.approx(in_one.tokens)
    assert in_shares.sums == pytest.approx(in_one.sums, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_scores_fall_with_bits_and_leave_the_model_as_it_was(make_bank, name):
    model = AssembledModel(make_bank("llama"), CPU)
    choices = choices_of(model.bank.layout)
    model.assign(None)
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    table = whole(name, model, choices).mean()
    rows = table[[u.layer is not None for u in model.bank.layout.units]][:, 1:]
    falls = np.diff(rows, axis=1) < 0
    noisy = "kl-fisher" in name or name in ALONE  # one square a pass, one walk, one company
    assert falls.mean() > 0.8 if noisy else falls.all()
    model.assign(None)
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    assert not any(p.requires_grad for p in model.module.parameters())
    assert all(p.grad is None for p in model.module.parameters())


@pytest.mark.parametrize("name", ["fisher", "kl-fisher", "kl-fisher-gaussian", "row-fisher"])
def test_second_order_predicts_the_loss_of_small_perturbations(evaluator, name):
    """At 8 bits the second order is nearly all: predicted KL is measured KL, within sampling."""
    choices = choices_of(evaluator.bank.layout)
    chunks = np.random.default_rng(2).integers(2, 300, (16, 24))
    table = whole(name, evaluator.model, choices, chunks).mean()
    column = menu(choices).index(Scheme("int8-channel"))
    predicted = np.nansum(table[:, column])
    schemes = [row[-1] for row in choices]
    losses = [evaluator.measure(schemes, ids) for ids in chunks]
    kl = sum(loss.kl_sum for loss in losses) / sum(loss.tokens for loss in losses)
    assert 0.4 < predicted / kl < 2.5


def test_measured_maps_correct_units_that_the_prior_misjudges():
    """A prior that is wrong by a factor of ten about some units is put right by whole maps."""
    from sensitivity.correction import MeasuredMap, corrected

    generator = np.random.default_rng(0)
    truth = np.exp(generator.normal(0, 1, (20, 1))) * np.array([[0.0, 1, 4, 16]])
    prior = truth.copy()
    prior[:5] *= 10
    choices = generator.integers(0, 4, (120, 20))
    kl = truth[np.arange(20)[None], choices].sum(axis=1) ** 0.7  # losses saturate
    maps = [MeasuredMap(tuple(c.tolist()), float(k), 0) for c, k in zip(choices, kl, strict=True)]
    logs = np.log(corrected(prior, maps)[:, 1] / truth[:, 1])
    assert logs[:5].mean() - logs[5:].mean() < 0.5 * np.log(10)
    untouched = corrected(prior, maps[:1])
    assert np.abs(np.log(untouched[:, 1:] / prior[:, 1:])).max() < np.log(3)


def test_measured_maps_are_measured_as_the_evaluator_does(evaluator):
    choices = choices_of(evaluator.bank.layout)
    share = Share((0, len(choices)), (1, 2))
    table = ESTIMATORS["measured-maps"].score(evaluator.model, CHUNKS, choices, share)
    columns = menu(choices)
    for found in table.maps[:3]:
        loss = evaluator.measure([columns[c] for c in found.choice], CHUNKS[1])
        assert found.kl == pytest.approx(loss.kl_sum / loss.tokens, rel=1e-3)


def test_interactions_are_what_two_changes_cost_together(evaluator):
    """Omega_ij = L(i, j) - L(i) - L(j) by plain measurements; symmetric, none with oneself."""
    from sensitivity.interactions import measure_interactions

    layout, choices = evaluator.bank.layout, choices_of(evaluator.bank.layout)
    units, schemes = (5, 1, 2), choices[1][:2]
    found = measure_interactions(evaluator.model, CHUNKS[:1], units, schemes)
    assert found.units == (1, 2, 5)  # two of one block, one of the next
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for s, t in ((0, 0), (0, 1), (1, 0)):
            both = {found.units[i]: schemes[s], found.units[j]: schemes[t]}
            alone = [measured(evaluator, at(layout, {u: x}), CHUNKS[:1]) for u, x in both.items()]
            expected = measured(evaluator, at(layout, both), CHUNKS[:1])
            omega = found.pairs[i, s, j, t]
            assert omega == pytest.approx(expected - sum(alone), abs=2e-3 * expected)
            assert found.pairs[j, t, i, s] == omega
            choice = [None] * 3
            choice[i], choice[j] = s, t
            assert found.predict(choice) * found.tokens == pytest.approx(expected, rel=2e-3)
    assert not found.pairs[np.arange(3), :, np.arange(3)].any()


def test_hutchinsons_trace_is_that_of_the_exact_hessian(tmp_path):
    """Of KL from itself, by a column of the Hessian for each weight of one small matrix."""
    from quantization.adapter import describe
    from quantization.bank import Bank
    from quantization.checkpoints import resolve
    from quantization.quantizers import QUANTIZERS
    from sensitivity.hessian_trace import _kl_from_itself, _traces
    from tests.conftest import save_tiny

    folder = save_tiny(
        "llama", tmp_path, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    checkpoint = resolve(str(folder))
    layout = describe(checkpoint)
    bank = Bank(checkpoint, layout, QUANTIZERS["rtn"], torch.float32)
    bank.build([[] for _ in layout.units])
    model = AssembledModel(bank, CPU)
    model.assign(None)
    ids = CHUNKS[0]
    site = next(s for u in layout.units for s in u.stored if s.name.endswith("k_proj"))
    parameter = model.parameter(site.parameter).requires_grad_(True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = model.module(input_ids=torch.from_numpy(ids)[None]).logits[0].float()
    [gradient] = torch.autograd.grad(_kl_from_itself(logits), parameter, create_graph=True)
    assert gradient.abs().max() < 1e-4  # the unquantized model is the minimum
    columns = [
        torch.autograd.grad(g, parameter, retain_graph=True)[0].flatten()
        for g in gradient.flatten()
    ]
    exact = torch.stack(columns).trace().item()
    parameter.requires_grad_(False)
    samples = [_traces(model, [site], ids, seed)[site.parameter] for seed in range(200)]
    error = np.std(samples) / np.sqrt(len(samples))
    assert abs(np.mean(samples) - exact) < 4 * error
    assert error < 0.1 * exact


@pytest.fixture(scope="module")
def opened(tiny_folders, tmp_path_factory):
    """A bank of a tied model whose menu opens the embedding, which is its head too."""
    from quantization.adapter import describe
    from quantization.bank import Bank
    from quantization.checkpoints import resolve
    from quantization.quantizers import QUANTIZERS

    checkpoint = resolve(str(tiny_folders("qwen3")))
    layout = describe(checkpoint)
    bank = Bank(checkpoint, layout, QUANTIZERS["rtn"], torch.float32, tmp_path_factory.mktemp("b"))
    choices = [
        [Scheme("int2-g32"), Scheme("int8-channel")] if unit.layer != 0 else [Scheme("bf16")]
        for unit in layout.units
    ]
    bank.build(choices)
    return bank, choices


def test_an_open_tied_embedding_has_the_gradient_of_both_its_uses(opened):
    """Even where the first block is pinned, so that nothing else wants the pass to go that far."""
    bank, choices = opened
    model = AssembledModel(bank, CPU)
    found = whole("fisher", model, choices)
    model.assign(None)
    site = bank.layout.units[0].stored[0]
    parameter = model.parameter(site.parameter).requires_grad_(True)
    expected = 0.0
    for index, ids in enumerate(CHUNKS):
        backward_of_samples(model.module, ids, seed=1000 * index)
        dw = bank.tensors(bank.layout.units[0], choices[0][0])[site.parameter] - parameter.data
        expected += 0.5 * (parameter.grad.double() ** 2 * dw.double() ** 2).sum().item()
        parameter.grad = None
    parameter.requires_grad_(False)
    column = menu(choices).index(choices[0][0])
    assert found.sums[0, column] == pytest.approx(expected, rel=1e-4)


def test_an_open_embedding_flips_as_the_evaluator_measures_and_leaves_the_head_alone(opened):
    bank, choices = opened
    evaluator = Evaluator(bank, CPU)
    head = evaluator.head.assigned_weight.data_ptr()
    table = whole("flips", evaluator.model, choices)
    expected = measured(evaluator, at(bank.layout, {0: choices[0][0]}), CHUNKS[:1])
    assert table.sums[0, menu(choices).index(choices[0][0])] == pytest.approx(expected, rel=1e-3)
    evaluator.model.assign(None)
    assert evaluator.head.assigned_weight.data_ptr() == head  # else KL would lose its exact form


@pytest.mark.parametrize("name", ["gradient", "shapley"])
def test_what_cant_be_scored_isnt_free(opened, name):
    bank, choices = opened
    table = whole(name, AssembledModel(bank, CPU), choices).mean()
    columns = [menu(choices).index(scheme) for scheme in choices[0]]
    assert np.isnan(table[0, columns]).all()
    assert np.isfinite(table[-1, columns]).all()


@pytest.mark.parametrize("name", ["fisher-quantized", "measured-maps", "flips-quantized", "fisher"])
def test_packed_banks_give_the_scores_of_dequantized_ones(make_bank, name):
    from quantization.bank import Bank

    plain = make_bank("llama")
    choices = choices_of(plain.layout)
    packed = Bank(plain.checkpoint, plain.layout, plain.quantizer, plain.dtype, packed=True)
    packed.build(choices)
    share = Share((0, len(choices)), (0, 1))
    tables = [
        ESTIMATORS[name].score(AssembledModel(bank, CPU), CHUNKS, choices, share)
        for bank in (plain, packed)
    ]
    assert tables[0].sums == pytest.approx(tables[1].sums, rel=1e-4, nan_ok=True)
    assert [m.kl for m in tables[0].maps] == pytest.approx([m.kl for m in tables[1].maps], rel=1e-3)


def test_experts_that_saw_little_lean_on_their_siblings():
    from sensitivity.base import Experts

    tokens = np.array([2000.0, 1.0, 0.0])
    found = Experts(np.array([[6000.0, 300.0, 0.0]]), tokens).shrunk()[0]
    assert found < 0.98 * 6300  # 300 from one token is mostly not believed
    quiet = Experts(np.array([[6000.0, 0.0, 0.0]]), tokens).shrunk()[0]
    assert quiet > 0.98 * 6000  # nor is it that two experts cost nothing
    rates = np.array([2.0, 4.0, 300.0, 0.0])
    many = Experts((rates * 1e6)[None], np.full(4, 1e6)).shrunk()[0]
    assert many == pytest.approx((rates * 1e6).sum(), rel=1e-3)  # evidence speaks for itself
    nothing = Experts(np.zeros((1, 3)), np.zeros(3)).shrunk()[0]
    assert nothing == 0


def with_caches(make_bank, family="llama"):
    """A model whose KV caches are units, exact weights, and their choices."""
    from quantization.bank import Bank
    from quantization.quantizers import QUANTIZERS

    plain = make_bank(family)
    layout = plain.layout.with_caches("apart")
    bank = Bank(plain.checkpoint, layout, QUANTIZERS["rtn"], torch.float32)
    own = [Scheme("bf16"), Scheme("int8-channel"), Scheme("int6-channel"), Scheme("int4-channel")]
    choices = [own if unit.kind == "cache" else [Scheme("bf16")] for unit in layout.units]
    bank.build(choices)
    return AssembledModel(bank, CPU), choices


LONG = np.random.default_rng(5).integers(2, 300, (24, 32))


@pytest.mark.parametrize("name", ["fisher", "row-fisher", "kl-fisher", "kl-fisher-gaussian"])
def test_second_order_scores_of_caches_are_what_fine_formats_cost(make_bank, name):
    """No gain is fitted: half of a quadratic form is the KL itself where errors are small."""
    model, choices = with_caches(make_bank)
    table = whole(name, model, choices, LONG).mean()
    evaluator = Evaluator(model.bank, CPU)
    caches = [u for u, unit in enumerate(model.bank.layout.units) if unit.kind == "cache"]
    column = menu(choices).index(Scheme("int6-channel"))
    predicted = table[caches, column].sum()
    schemes = [Scheme("int6-channel") if u in caches else None for u in range(len(choices))]
    losses = [evaluator.measure(schemes, ids) for ids in LONG]
    measured = sum(loss.kl_sum for loss in losses) / sum(loss.tokens for loss in losses)
    assert predicted == pytest.approx(measured, rel=0.35)
    assert (np.diff(table[caches][:, menu(choices).index(Scheme("int8-channel")) :]) > 0).all()
    assert (table[caches, menu(choices).index(Scheme("bf16"))] == 0).all()


def test_flips_of_caches_are_their_measured_losses(make_bank):
    model, choices = with_caches(make_bank)
    table = whole("flips", model, choices, CHUNKS[:1])
    evaluator = Evaluator(model.bank, CPU)
    scheme = Scheme("int4-channel")
    for u, unit in enumerate(model.bank.layout.units):
        if unit.kind == "cache":
            flip = [scheme if v == u else None for v in range(len(choices))]
            assert table.sums[u, menu(choices).index(scheme)] == pytest.approx(
                evaluator.measure(flip, CHUNKS[0]).kl_sum, rel=1e-3, abs=1e-5
            )


def test_slopes_of_caches_are_derivatives(make_bank):
    """At a map, what a change of one cache's format makes, to first order."""
    from sensitivity.slopes import measure_slopes

    model, choices = with_caches(make_bank)
    evaluator = Evaluator(model.bank, CPU)
    base = [row[-1] if len(row) > 1 else row[0] for row in choices]  # every cache in four bits
    columns = menu(choices)
    pairs = []
    for ids in LONG:
        here = measure_slopes(evaluator, base, ids, choices)
        for u, unit in enumerate(model.bank.layout.units):
            if unit.kind == "cache":
                changed = [*base]
                changed[u] = Scheme("int6-channel")
                after = evaluator.measure(changed, ids).kl_sum
                row = here.sums[u]
                expected = row[columns.index(changed[u])] - row[columns.index(base[u])]
                pairs.append((expected, after - here.loss.kl_sum))
    predicted, found = np.array(pairs).T
    assert np.corrcoef(predicted, found)[0, 1] > 0.8


@pytest.mark.parametrize("name", ["fisher", "row-fisher", "kl-fisher"])
def test_second_order_scores_of_activations_are_what_fine_formats_cost(make_bank, name):
    """Weights and activations add up, in a scheme and over units."""
    from quantization.bank import Bank
    from quantization.quantizers import QUANTIZERS

    plain = make_bank("llama")
    menu_ = [Scheme.parse(n) for n in ("bf16", "bf16/int6-token", "int6-channel",
                                       "int6-channel/int6-token")]  # fmt: skip
    bank = Bank(plain.checkpoint, plain.layout, QUANTIZERS["rtn"], torch.float32)
    choices = choices_of(plain.layout, menu_)
    bank.build(choices)
    model = AssembledModel(bank, CPU)
    table, columns = whole(name, model, choices, LONG).mean(), menu(choices)
    column = {scheme.name: columns.index(scheme) for scheme in menu_}
    inside = [u for u, unit in enumerate(bank.layout.units) if unit.layer is not None]
    read, stored = (table[inside, column[n]] for n in ("bf16/int6-token", "int6-channel"))
    both = table[inside, column["int6-channel/int6-token"]]
    rounding = table[inside, column["bf16/int6-token"]].min() * 0.05
    np.testing.assert_allclose(both, read + stored, rtol=0.02, atol=rounding)
    evaluator = Evaluator(bank, CPU)
    for scheme in menu_[1:]:
        schemes = [scheme if u in inside else None for u in range(len(choices))]
        losses = [evaluator.measure(schemes, ids) for ids in LONG]
        kl = sum(loss.kl_sum for loss in losses) / sum(loss.tokens for loss in losses)
        assert table[inside, columns.index(scheme)].sum() == pytest.approx(kl, rel=0.35)
