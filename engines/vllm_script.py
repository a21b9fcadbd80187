"""What an environment with vLLM runs: loads a folder, scores chunks and generates. Imports nothing of ours.

PYTHON vllm_script.py < request.json      prints one line of JSON behind MARK
"""

import json
import os
import sys
import time

MARK = "bitfront-vllm:"
STEPS = 32


def main() -> None:
    """Answer the request."""
    request = json.load(sys.stdin)
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; half of the memory otherwise
    import vllm

    chunks = request["chunks"]
    model = vllm.LLM(
        request["folder"],
        max_model_len=len(chunks[0]) + STEPS,
        enforce_eager=True,
        **request["options"],
    )
    scored = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    nll, best = [], []
    for ids in chunks:
        [found] = model.generate([{"prompt_token_ids": ids}], scored, use_tqdm=False)
        following = found.prompt_logprobs[1:]
        nll.append(-sum(p[i].logprob for p, i in zip(following, ids[1:], strict=True)))
        best.append([min(p, key=lambda i: p[i].rank) for p in following])
    steps = vllm.SamplingParams(max_tokens=STEPS, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    model.generate([{"prompt_token_ids": chunks[0][:1]}], steps, use_tqdm=False)
    speed = STEPS / (time.perf_counter() - start)
    found = {"version": vllm.__version__, "nll": nll, "best": best, "tokens_per_s": speed}
    sys.stdout.write(MARK + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
