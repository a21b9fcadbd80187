"""Intel AutoRound's AutoScheme as an allocator: maps in Track A's form.

A draft: no figure of it is recorded, and it has not been run to its end yet.

In an environment of its own:

    python -m venv AR && AR/bin/pip install auto-round transformers accelerate torch
    AR/bin/python benchmarks/peers/autoround.py MODEL_DIR TEXT OUT_DIR
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS, GROUP = (2, 3, 4, 6, 8), 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", default="3.25,3.5,3.75,4.25,4.75,5.25")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ids = tokenizer(Path(given.text).read_text(), return_tensors="pt").input_ids[0]
    data = list(ids[: given.chunks * given.length].reshape(given.chunks, given.length))
    options = [
        QuantizationScheme(bits=b, group_size=GROUP, sym=True, data_type="int") for b in BITS
    ]
    for bits in (float(b) for b in given.bits.split(",")):
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
        sizes = {n: m.weight.numel() for n, m in model.named_modules()
                 if isinstance(m, torch.nn.Linear) and "lm_head" not in n}  # fmt: skip
        shared = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
        scheme = AutoScheme(avg_bits=bits, options=options, shared_layers=shared)
        tuner = AutoRound(
            model, tokenizer, scheme=scheme, dataset=data, iters=0, nsamples=given.chunks,
            seqlen=given.length, batch_size=1, disable_opt_rtn=True,
        )  # fmt: skip
        tuner.quantize()
        found = {name: int(tuner.layer_config[name]["bits"]) for name in sizes}
        exact = sum(sizes[n] * (b + 16 / GROUP) for n, b in found.items()) / sum(sizes.values())
        name = f"autoround-{bits:g}.json"
        (given.out / name).write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {exact:.4f} bits")


if __name__ == "__main__":
    main()
