"""KL from hidden states: equal to the textbook in float32, for every kind of head."""

from collections import Counter

import numpy as np
import pytest
import torch

from evaluation.divergence import FixedReference, Head, divergence
from evaluation.evaluator import Evaluator
from quantization.bank import Bank
from quantization.checkpoints import load_model
from quantization.errors import MeasurementError
from quantization.originals import Originals
from quantization.quantizers import QUANTIZERS
from quantization.schemes import Scheme
from tests.conftest import MENU

CPU = torch.device("cpu")
IDS = np.random.default_rng(0).integers(2, 300, 48)


def textbook(p_logits, q_logits, ids):
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q))[:-1].sum().item()
    nll = -q[:-1].gather(-1, torch.from_numpy(ids)[1:, None]).sum().item()
    return kl, nll


def schemes_of(layout, scheme, outer=Scheme("bf16")):
    return [outer if unit.layer is None else scheme for unit in layout.units]


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "mixtral", "gpt_neox"])
@pytest.mark.parametrize("scheme", MENU, ids=lambda s: s.name)
def test_equals_the_textbook_in_float32(make_bank, family, scheme):
    """Gemma caps its logits, Cohere scales them; both are found by trying, not by name."""
    evaluator = Evaluator(make_bank(family), CPU)
    logits = {}
    batch = torch.from_numpy(IDS)[None]
    with torch.inference_mode():
        for name, schemes in (("p", None), ("q", schemes_of(evaluator.bank.layout, scheme))):
            evaluator.model.assign(schemes)
            logits[name] = evaluator.model.module(input_ids=batch).logits[0]
    kl, nll = textbook(logits["p"], logits["q"], IDS)
    found = evaluator.measure(schemes_of(evaluator.bank.layout, scheme), IDS)
    assert found.kl_sum == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert found.nll_sum == pytest.approx(nll, rel=1e-5)
    assert found.tokens == len(IDS) - 1


@pytest.mark.parametrize("family", ["llama", "cohere", "gemma2"])
def test_the_gradient_by_the_final_states_is_autograds(make_bank, family):
    """And the loss beside it is the measured one; a capped head has none, which is said."""
    evaluator = Evaluator(make_bank(family), CPU)
    schemes = schemes_of(evaluator.bank.layout, MENU[0])
    p_TH = evaluator.reference(IDS)
    evaluator.model.assign(schemes)
    q_TH = evaluator.hidden(evaluator.model.module, IDS)
    loss, found = evaluator.loss_with_gradient(p_TH, q_TH, IDS)
    assert loss == evaluator.loss(p_TH, q_TH, IDS)
    if family == "gemma2":
        assert found is None
        return
    scale = evaluator.head.scale
    weights = [w.detach().double() for w in (evaluator.head.weight, evaluator.head.assigned_weight)]
    q_TH = q_TH.clone().double().requires_grad_()
    p_TV, q_TV = (
        (scale * h @ w.T)[:-1].log_softmax(-1)
        for h, w in zip((p_TH.double(), q_TH), weights, strict=True)
    )
    (p_TV.exp() * (p_TV - q_TV)).sum().backward()
    assert torch.allclose(found.double(), q_TH.grad, rtol=1e-3, atol=1e-6)


def test_heads_are_recognised(make_bank):
    assert Evaluator(make_bank("llama"), CPU).head.scale == 1.0
    assert Evaluator(make_bank("gemma2"), CPU).head.scale is None
    cohere = Evaluator(make_bank("cohere"), CPU)
    assert cohere.head.scale == pytest.approx(cohere.model.module.config.logit_scale, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_quantized_head_counts(make_bank, tmp_path, family):
    """A menu may open embedding and head: then the candidate's logits come from its own head."""
    source = make_bank(family)
    layout = source.layout
    bank = Bank(source.checkpoint, layout, QUANTIZERS["rtn"], torch.float32, tmp_path)
    scheme = Scheme("int4-g64-asym")
    bank.build([[scheme]] * len(layout.units))
    evaluator = Evaluator(bank, CPU)
    schemes = [scheme] * len(layout.units)
    batch = torch.from_numpy(IDS)[None]
    with torch.inference_mode():
        p_logits = evaluator.model.module(input_ids=batch).logits[0]
        evaluator.model.assign(schemes)
        q_logits = evaluator.model.module(input_ids=batch).logits[0]
    found = evaluator.measure(schemes, IDS)
    assert found.kl_sum == pytest.approx(textbook(p_logits, q_logits, IDS)[0], rel=1e-3)


def test_the_reference_loses_nothing(make_bank):
    evaluator = Evaluator(make_bank("llama"), CPU)
    assert evaluator.measure(None, IDS).kl_sum == 0
    assert evaluator.noise_floor(IDS) is None


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 30.0])
def test_bf16_keeps_small_differences(scale):
    """Where the textbook drowns in bf16's rounding, the difference of hidden states doesn't."""
    torch.manual_seed(0)

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(32, 500, bias=False, dtype=torch.bfloat16)
            self.head.weight.data.normal_()

        def get_output_embeddings(self):
            return self.head

        base_model = torch.nn.Identity()

        def forward(self, **_):
            hidden = self.base_model.forward().last_hidden_state
            return type("Output", (), {"logits": self.head(hidden)})

    head = Head(Toy())
    p = torch.randn(64, 32).bfloat16()
    q = (p.float() + scale * torch.randn(64, 32)).bfloat16()
    targets = torch.randint(0, 500, (64,))
    w = head.weight.double()
    exact_p, exact_q = p.double() @ w.T, q.double() @ w.T
    exact = (exact_p.softmax(-1) * (exact_p.log_softmax(-1) - exact_q.log_softmax(-1))).sum().item()
    found = divergence(head, p, q, targets)
    assert found.kl_sum >= 0
    # p itself is rounded to bf16 logits; the divergence around it is not
    assert found.kl_sum == pytest.approx(exact, rel=0.05, abs=1e-6)


def test_switching_copies_no_weights(make_bank):
    bank = make_bank("llama")
    model = Evaluator(bank, CPU).model
    unit = next(u for u in bank.layout.units if u.layer == 0)
    for scheme in MENU:
        model.assign(schemes_of(bank.layout, scheme))
        for site in unit.sites:
            held = model.parameter(site.parameter).data_ptr()
            assert held == bank.tensors(unit, scheme)[site.parameter].data_ptr()


def test_a_candidate_assembled_twice_measures_the_same(make_bank):
    evaluator = Evaluator(make_bank("mixtral"), CPU)
    low, high = (schemes_of(evaluator.bank.layout, s) for s in (MENU[0], MENU[2]))
    first = evaluator.measure(low, IDS)
    evaluator.measure(high, IDS)
    assert evaluator.measure(low, IDS).kl_sum == first.kl_sum


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bf16_noise_is_measured_against_a_block_of_float32_at_a_time(
    make_bank, monkeypatch, family
):
    evaluator = Evaluator(make_bank(family, torch.bfloat16), CPU)
    layout, most, read = evaluator.bank.layout, 0, Originals.reference
    units = {unit.name for unit in layout.units}

    def reference(bank, unit):
        nonlocal most
        found = read(bank, unit)
        most = max(most, len(bank._held.keys() & units))
        return found

    monkeypatch.setattr(Originals, "reference", reference)
    floor = evaluator.noise_floor(IDS)
    by_block = Counter(unit.layer for unit in layout.units)
    outer = by_block.pop(None)
    assert most == outer + max(by_block.values()) < len(layout.units)

    whole = load_model(evaluator.bank.checkpoint, torch.float32)
    p_TH, q_TH = evaluator.hidden(whole, IDS), evaluator.reference(IDS).float()
    targets = torch.from_numpy(IDS[1:])
    expected = divergence(Head(whole), p_TH[:-1], q_TH[:-1], targets)
    assert floor == pytest.approx(expected.kl_sum / expected.tokens, rel=1e-4)
    assert 0 < floor < 0.1


def test_nan_in_the_logits_is_one_line(make_bank, monkeypatch):
    evaluator = Evaluator(make_bank("llama"), CPU)
    evaluator.reference(IDS)
    poison = torch.full((len(IDS), 64), float("nan"))
    monkeypatch.setattr(evaluator, "hidden", lambda module, ids: poison)
    with pytest.raises(MeasurementError, match="logits of a candidate in float32"):
        evaluator.measure(schemes_of(evaluator.bank.layout, MENU[0]), IDS)
    fresh = np.roll(IDS, 1)
    with pytest.raises(MeasurementError, match="unquantized model's hidden states"):
        evaluator.reference(fresh)


@pytest.mark.parametrize("size", [1e-5, 1e-2, 1.0, 300.0])
def test_a_fixed_reference_is_exact_for_small_and_huge_differences(make_bank, size):
    head = Evaluator(make_bank("llama"), CPU).head
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(20, head.weight.shape[1], generator=generator)
    q = p + size * torch.randn(p.shape, generator=generator)
    exact = [(h.double() @ head.weight.double().T).log_softmax(-1) for h in (p, q)]
    kl = (exact[0].exp() * (exact[0] - exact[1])).sum().item()
    assert FixedReference(head, p).kl_sum(q) == pytest.approx(kl, rel=2e-3)


def test_a_head_with_a_bias_is_not_taken_for_linear():
    """At large probes a bias is small, so a wide head with one must be told by its parameter."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        hidden_size=1024, vocab_size=300, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    model = PhiForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    head = Head(model)
    assert head.scale is None
    ids = torch.randint(0, 300, (1, 12))
    with torch.no_grad():
        states = model.base_model(input_ids=ids).last_hidden_state[0]
        logits = model(input_ids=ids).logits[0]
    found = divergence(head, states[:-1], 1.1 * states[:-1], ids[0, 1:])
    q = (logits + 0.1 * (logits - model.lm_head.bias.detach()))[:-1].log_softmax(-1)
    p = logits[:-1].log_softmax(-1)
    assert found.kl_sum == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
    assert found.nll_sum == pytest.approx(-float(q.gather(-1, ids[0, 1:, None]).sum()), rel=1e-4)
