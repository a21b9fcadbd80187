"""vLLM itself on what was written for it, where an environment has it.

`$BITFRONT_VLLM` names that environment's Python: vLLM wants a torch of its own. Its kernels compute in
16 bits, so losses differ a little from those that were measured.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from math import exp
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from engines import vllm_script
from engines.base import Export
from quantization.checkpoints import load_config
from quantization.errors import ExportError

PYTHON = "BITFRONT_VLLM"
CHUNKS = 4
"""That it is compared on, at most."""
TOLERANCE_NATS = 0.05
"""Per token, of the likelihood."""
LONGEST_S = 1800
ISOLATED = ("-I",)
"""This room has files that are called like libraries."""
MISSING = "No module named 'vllm'"
TOLD = 300
"""Characters of what vLLM says."""


def served(export: Export, folder: Path, **options: Any) -> dict[str, Any]:
    """How vLLM agrees with the candidate.

    Args:
        export: what was written.
        folder: where.
        options: of vLLM's model.

    Returns:
        Nothing without `$BITFRONT_VLLM`; else under `vllm` its version, `perplexity` and the candidate's
        `measured_perplexity` on the same chunks, `top1_agreement`, and generated tokens a second; or why
        it `refused`, which depends on the machine, too.

    Raises:
        ExportError: it computes something else, or there is no such Python, or none with vLLM.
    """
    python = os.environ.get(PYTHON)
    if not python:
        return {}
    assert export.evaluator is not None
    assert export.chunks is not None
    config = load_config(export.evaluator.bank.checkpoint)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    room = longest - vllm_script.STEPS if longest else None  # vLLM takes no longer ones
    chunks = export.chunks[:CHUNKS, :room]
    request = {"folder": str(folder), "chunks": chunks.tolist(), "options": options}
    found = _run(python, request)
    if "refused" in found:
        return {"vllm": found}
    nll = own_nll = same = 0.0
    for ids, best in zip(chunks, found["best"], strict=True):
        own = export.evaluator.logits(export.precision_map.schemes, ids)[:-1].log_softmax(-1).cpu()
        own_nll -= float(own.gather(-1, torch.from_numpy(ids[1:])[:, None]).sum())
        same += float((own.argmax(-1) == torch.tensor(best)).sum())
    tokens = chunks.shape[0] * (chunks.shape[1] - 1)
    nll, own_nll = sum(found["nll"]) / tokens, own_nll / tokens
    if not abs(nll - own_nll) <= TOLERANCE_NATS:
        raise ExportError(
            f"vLLM gives the text {nll:.4f} nats a token where {own_nll:.4f} was measured, more than "
            f"{TOLERANCE_NATS} off; nothing was exported"
        )
    return {
        "vllm": {
            "version": found["version"],
            "perplexity": exp(nll),
            "measured_perplexity": exp(own_nll),
            "top1_agreement": same / tokens,
            "generated_tokens_per_s": found["tokens_per_s"],
        }
    }


def _run(python: str, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        done = subprocess.run(  # noqa: S603  # what the user named
            [python, *ISOLATED, vllm_script.__file__],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
            cwd=request["folder"],
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExportError(f"${PYTHON} is '{python}', which can't run vLLM: {error}") from error
    for line in done.stdout.splitlines():
        if line.startswith(vllm_script.MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(vllm_script.MARK))
            return found
    if MISSING in done.stderr:
        raise ExportError(
            f"${PYTHON} is '{python}', which has no vLLM; install it there: pip install vllm"
        )
    lines = done.stderr.replace("[rank0]:", "").splitlines()
    last = max((i for i, line in enumerate(lines) if "Error" in line), default=-1)
    return {"refused": shorten(" ".join(lines[last:]), TOLD, placeholder=" …") or "no word"}
