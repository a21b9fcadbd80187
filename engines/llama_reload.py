"""What llama.cpp makes of a file, beside what was measured: loss, best tokens, speed."""

from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.gguf_tokenizer import agrees
from engines.llama_library import LlamaModel
from quantization.schemes import Scheme

if TYPE_CHECKING:
    from evaluation.evaluator import Evaluator

STEPS = 16
"""Tokens that are generated for the speed."""


def compared(
    evaluator: "Evaluator",
    schemes: Sequence[Scheme],
    file: Path,
    chunks: NDArray[np.int64],
    caches: tuple[str, str],
) -> dict[str, Any]:
    """KL from the unquantized model to llama.cpp, and how it agrees with the candidate.

    Args:
        evaluator: of the candidate.
        schemes: the candidate's.
        file: what was written of it.
        chunks: chunks x tokens.
        caches: ggml's types of the KV cache.

    Returns:
        `reloaded_kl`; `reloaded_perplexity` and the candidate's `measured_perplexity` on the same
        chunks; `top1_agreement`, the share of tokens whose likeliest successor is the candidate's;
        tokens a second, of a prompt and generated; whether both split text alike.
    """
    kl = nll = own_nll = same = tokens = 0.0
    length = chunks.shape[1]
    with LlamaModel(
        file, torch.get_num_threads(), context=length + STEPS, batch=length, caches=caches
    ) as model:
        agreed = agrees(model, evaluator.bank.checkpoint)
        for ids in chunks:
            wanted = evaluator.reference_logits(ids)[:-1]
            log_p = wanted.log_softmax(-1)
            own = evaluator.logits(schemes, ids)[:-1].log_softmax(-1)
            found = torch.from_numpy(model.logits(ids)[:-1])[:, : wanted.shape[1]]
            log_q = found.log_softmax(-1)
            following = torch.from_numpy(ids[1:])[:, None]
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            nll -= float(log_q.gather(-1, following).sum())
            own_nll -= float(own.gather(-1, following).sum())
            same += float((log_q.argmax(-1) == own.argmax(-1)).sum())
            tokens += len(found)
        prompt_s = min(model.prefill_s(length, 2))
        steps_s = sorted(model.step_s() for _ in range(STEPS))
    return {
        "reloaded_kl": kl / tokens,
        "reloaded_perplexity": exp(min(nll / tokens, 700.0)),
        "measured_perplexity": exp(min(own_nll / tokens, 700.0)),
        "top1_agreement": same / tokens,
        "prompt_tokens_per_s": length / prompt_s,
        "generated_tokens_per_s": 1 / steps_s[STEPS // 2],
        "tokens_agree": agreed,
    }
