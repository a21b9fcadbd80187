"""Exports in vLLM, where `$BITFRONT_VLLM` names the Python of an environment with it."""

import os
import stat
import sys

import pytest
import torch

from engines import load_target, vllm_script
from engines.vllm_caches import cache_flags, cache_options
from engines.vllm_reload import PYTHON, served
from quantization.adapter import describe
from quantization.bank import Bank
from quantization.checkpoints import resolve
from quantization.errors import ExportError
from quantization.quantizers import QUANTIZERS
from quantization.schemes import Scheme
from tests.conftest import choices_of, save_tiny
from tests.engines.test_checkpoint_targets import MENUS, mixed_export

TALKING = """#!{python}
import json, sys
request = json.load(sys.stdin)
print("noise of a library")
{answer}
"""


@pytest.fixture
def export(make_bank):
    llama = make_bank("llama")
    llama.build(choices_of(llama.layout, [Scheme(name) for name in MENUS["gptq"]]))
    return mixed_export(llama, MENUS["gptq"])


@pytest.fixture
def talking(tmp_path, monkeypatch):
    """A stand-in for that Python, which answers what it is told to."""

    def made(answer):
        file = tmp_path / "python"
        file.write_text(TALKING.format(python=sys.executable, answer=answer))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv(PYTHON, str(file))

    return made


def answer_of(export, shift=0.0):
    """What the candidate itself would say, with other likelihoods."""
    nll, best = [], []
    for ids in export.chunks[:4]:
        log_p = export.evaluator.logits(export.precision_map.schemes, ids)[:-1].log_softmax(-1)
        following = torch.from_numpy(ids[1:])[:, None]
        nll.append(-float(log_p.gather(-1, following).sum()) + shift * len(following))
        best.append(log_p.argmax(-1).tolist())
    return f"""
found = {{"version": "0", "nll": {nll}, "best": {best}, "tokens_per_s": 5.0}}
assert len(request["chunks"]) == {len(nll)} and request["options"] == {{"dtype": "half"}}
print({vllm_script.MARK!r} + json.dumps(found))
"""


def test_without_vllm_nothing_is_said(export, tmp_path, monkeypatch):
    monkeypatch.delenv(PYTHON, raising=False)
    assert served(export, tmp_path) == {}


def test_the_candidate_agrees_with_itself(export, tmp_path, talking):
    talking(answer_of(export))
    found = served(export, tmp_path, dtype="half")["vllm"]
    assert found["top1_agreement"] == 1
    assert found["perplexity"] == pytest.approx(found["measured_perplexity"])


def test_something_else_is_refused(export, tmp_path, talking):
    talking(answer_of(export, shift=0.06))
    with pytest.raises(ExportError, match="nats a token"):
        served(export, tmp_path, dtype="half")


def test_what_vllm_refuses_is_told(export, tmp_path, talking):
    talking("raise ValueError('no kernel')")
    assert served(export, tmp_path)["vllm"] == {"refused": "ValueError: no kernel"}


def test_a_python_without_vllm(export, tmp_path, talking):
    talking("import vllm")
    with pytest.raises(ExportError, match="which has no vLLM; install it there"):
        served(export, tmp_path)


def test_no_such_python(export, tmp_path, monkeypatch):
    monkeypatch.setenv(PYTHON, str(tmp_path / "nowhere"))
    with pytest.raises(ExportError, match=r"nowhere', which can't run vLLM"):
        served(export, tmp_path)


def test_flags_and_options_say_the_same():
    caches = {0: "bf16", 1: "fp8-e4m3", 2: "bf16"}
    flags = cache_flags(caches)
    assert flags == " --kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0 2"
    assert cache_options(caches) == {
        "kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0", "2"],
    }  # fmt: skip


@pytest.mark.skipif(PYTHON not in os.environ, reason="$BITFRONT_VLLM names no Python with vLLM")
@pytest.mark.parametrize("target", ["compressed-tensors", "gptq"])
def test_vllm_computes_what_was_measured(tmp_path, target):
    """Formats that its kernels for CPUs have, too."""
    schemes = {
        "compressed-tensors": ["int4-g32-bf16", "int4-g64-asym-bf16", "bf16"],
        "gptq": ["int4-g32", "bf16"],
    }[target]
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    folder = save_tiny("llama", tmp_path / "model", initializer_range=0.05, **sizes)
    checkpoint = resolve(str(folder))
    bank = Bank(checkpoint, describe(checkpoint), QUANTIZERS["rtn"], torch.float32)
    bank.build(choices_of(bank.layout, [Scheme.parse(name) for name in schemes]))
    export = mixed_export(bank, schemes)
    (place := tmp_path / "made").mkdir()
    load_target(target).write(export, place)
    found = load_target(target).check(export, place)["vllm"]
    assert found.get("top1_agreement", 0) > 0.8, found
