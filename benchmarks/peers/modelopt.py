"""NVIDIA Model-Optimizer's AutoQuantize as an allocator: maps in Track A's form, by its own scoring.

A draft: no figure of it is recorded, and it has not been run to its end yet.

In an environment of its own:

    python -m venv MO && MO/bin/pip install nvidia-modelopt transformers accelerate torch
    MO/bin/python benchmarks/peers/modelopt.py MODEL_DIR TEXT OUT_DIR [--method gradient|kl_div]
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import modelopt.torch.quantization as mtq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS, GROUP = (2, 3, 4, 6, 8), 64


def scheme(bits: int) -> dict[str, Any]:
    """Symmetric integers in groups, the head kept."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "enable": True,
             "cfg": {"num_bits": bits, "block_sizes": {-1: GROUP}}},
            {"quantizer_name": "*lm_head*", "enable": False},
        ],
        "algorithm": "max",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", default="gradient", choices=["gradient", "kl_div"])
    parser.add_argument("--bits", default="3.25,3.5,3.75,4.25,4.75,5.25")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ids = tokenizer(Path(given.text).read_text(), return_tensors="pt").input_ids[0]
    ids = ids[: given.chunks * given.length].reshape(given.chunks, given.length)
    batches = [{"input_ids": chunk[None]} for chunk in ids]

    def loss(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits, labels = output.logits[0, :-1].float(), batch["input_ids"][0, 1:]
        return torch.nn.functional.cross_entropy(logits, labels)

    def forward(model: Any, batch: dict[str, torch.Tensor]) -> Any:
        output = model(**batch, use_cache=False)
        return output if given.method == "gradient" else output.logits

    checkpoint = given.out / f"scores-{given.method}.pth"
    for bits in (float(b) for b in given.bits.split(",")):
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
        sizes = {n: m.weight.numel() for n, m in model.named_modules()
                 if isinstance(m, torch.nn.Linear) and "lm_head" not in n}  # fmt: skip
        # its bits count no scales, and its sizes count the head, which stays at 16
        head = model.lm_head.weight.numel()
        wanted = ((bits - 16 / GROUP) * sum(sizes.values()) + 16 * head) / (
            sum(sizes.values()) + head
        )
        model, _ = mtq.auto_quantize(
            model,
            constraints={"effective_bits": wanted},
            quantization_formats=[scheme(b) for b in BITS],
            data_loader=batches,
            forward_step=forward,
            loss_func=loss if given.method == "gradient" else None,
            num_calib_steps=1,
            num_score_steps=len(batches),
            disabled_layers=["*lm_head*"],
            method=given.method,
            checkpoint=str(checkpoint),  # scored once, solved for each budget
            verbose=True,
        )
        found = {}
        for name in sizes:
            quantizer = model.get_submodule(name).weight_quantizer
            found[name] = quantizer.num_bits if quantizer.is_enabled else 16
        exact = sum(sizes[n] * (b + 16 / GROUP) for n, b in found.items()) / sum(sizes.values())
        name = f"modelopt-{given.method.replace('_', '-')}-{bits:g}.json"
        (given.out / name).write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {exact:.4f} bits")


if __name__ == "__main__":
    main()
