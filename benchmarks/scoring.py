"""Seconds of scoring the demo model under five schemes: ours against NVIDIA Model-Optimizer's.

The same text, menu (integers of 2, 3, 4, 6 and 8 bits, groups of 64), threads and machine, one after
the other in one run. Model-Optimizer needs an environment of its own, since its requirements differ:

    python -m venv MO && MO/bin/pip install nvidia-modelopt requests transformers accelerate torch
    python benchmarks/scoring.py TEXT --modelopt MO/bin/python [--chunks 16] [--json PATH]
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

BITS = (2, 3, 4, 6, 8)
OURS = ("fisher", "row-fisher", "kl-fisher", "gradient")

# what runs in Model-Optimizer's environment: model folder, ids, number type, threads
PEER = """
import sys, time, numpy as np, torch
import modelopt.torch.quantization as mtq
from transformers import AutoModelForCausalLM
folder, ids, dtype, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
chunks = torch.from_numpy(np.load(ids))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
def config(bits):
    return {"quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "enable": True,
         "cfg": {"num_bits": bits, "block_sizes": {-1: 64}}},
        {"quantizer_name": "*lm_head*", "enable": False},
    ], "algorithm": "max"}
batches = [{"input_ids": c[None]} for c in chunks]
starts = []
def loss(output, batch):
    logits, labels = output.logits[0, :-1].float(), batch["input_ids"][0, 1:]
    starts.append(time.perf_counter())
    return torch.nn.functional.cross_entropy(logits, labels)
mtq.auto_quantize(
    model, constraints={"effective_bits": 8.0}, quantization_formats=[config(b) for b in BITS],
    data_loader=batches, forward_step=lambda m, b: m(**b, use_cache=False), loss_func=loss,
    num_calib_steps=1, num_score_steps=len(batches), disabled_layers=["*lm_head*"], verbose=True,
)
# from one batch's loss to the next: a whole step, without set-up and solving
steps = np.diff(starts)
print("SECONDS", float(np.median(steps)), len(starts))
""".replace("BITS", str(BITS))


def peer_seconds(python: Path, folder: str, ids: Path, dtype: str, threads: int) -> float:
    """Model-Optimizer's seconds a chunk."""
    command = [str(python), "-c", PEER, folder, str(ids), dtype, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "SECONDS" not in done.stdout:
        raise SystemExit(f"Model-Optimizer failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return float(done.stdout.split("SECONDS")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--modelopt", type=Path, help="the Python that has nvidia-modelopt")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    from bitfront.config import load_config
    from bitfront.pipeline import spec_of
    from bitfront.plan import make_plan
    from sensitivity import ESTIMATORS, merge
    from workers.session import Session

    menu = ",".join(f"int{bits}-g64" for bits in BITS)
    size = {"chunks": given.chunks, "length": given.length}
    overrides = {"menu": menu, "texts.calibration": {"source": given.text, **size}}
    plan = make_plan(load_config("demo", None, overrides))
    session = Session(spec_of(plan, os.environ.get("BITFRONT_CACHE")))
    threads = os.cpu_count() or 1
    model, chunks = session.evaluator.model, plan.texts["calibration"].ids
    import torch

    torch.set_num_threads(threads)
    results: dict[str, object] = {"threads": threads, "arithmetic": plan.dtype, **size}
    rows = {}
    for share in ESTIMATORS[OURS[0]].shares(len(plan.choices), 1):  # the bank's pages, and torch
        ESTIMATORS[OURS[0]].score(model, chunks[:1], plan.choices, share)
    for name in OURS:
        start = time.perf_counter()
        shares = ESTIMATORS[name].shares(len(plan.choices), len(chunks))
        merge(ESTIMATORS[name].score(model, chunks, plan.choices, share) for share in shares)
        rows[name] = (time.perf_counter() - start) / len(chunks)
        print(f"{name:<14}{rows[name]:8.2f} s a chunk", flush=True)
    if given.modelopt:
        with tempfile.TemporaryDirectory() as folder:
            ids = Path(folder, "ids.npy")
            np.save(ids, chunks[: min(4, len(chunks))])
            folder_of_model = plan.checkpoint.folder
            peer = peer_seconds(given.modelopt, folder_of_model, ids, plan.dtype, threads)
        print(f"{'modelopt':<14}{peer:8.2f} s a chunk")
        results["over_modelopt"] = {name: round(s / peer, 3) for name, s in rows.items()}
        for name, ratio in results["over_modelopt"].items():
            print(f"{name:<14}{ratio:8.3f} of Model-Optimizer's time")
        rows["modelopt"] = peer
    results["seconds_a_chunk"] = {name: round(s, 3) for name, s in rows.items()}
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
