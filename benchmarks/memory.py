"""Peak memory of estimators on a model that is written to disk and never held: 3 billion weights.

Writes a random Llama-shaped checkpoint in bfloat16, makes its bank of packed bytes, and runs each
estimator in a process of its own, which reports its peak resident memory and what it had before.

    python benchmarks/memory.py FOLDER [--layers 28] [--json PATH]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

SCHEMES = ("int3-g64", "int4-g64")
ESTIMATORS = ("output-error", "kl-fisher")
CHUNKS, LENGTH = 4, 512
VOCABULARY = 128256


def write_checkpoint(folder: Path, layers: int, width: int, vocabulary: int = VOCABULARY) -> int:
    """A random checkpoint, layer by layer; the number of its weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=width // 384, head_dim=128,
        vocab_size=vocabulary, tie_word_embeddings=True, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    kv, inner = config.num_key_value_heads * 128, config.intermediate_size
    generator, total = torch.Generator().manual_seed(0), 0

    def save(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        tensors = {
            key: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            for key, shape in shapes.items()
        }
        total += sum(t.numel() for t in tensors.values())
        if not (folder / name).exists():
            save_file(tensors, folder / name, metadata={"format": "pt"})

    save("model-outer.safetensors", {
        "model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,),
    })  # fmt: skip
    for i in range(layers):
        at = f"model.layers.{i}"
        save(f"model-{i:03}.safetensors", {
            f"{at}.self_attn.q_proj.weight": (width, width),
            f"{at}.self_attn.k_proj.weight": (kv, width),
            f"{at}.self_attn.v_proj.weight": (kv, width),
            f"{at}.self_attn.o_proj.weight": (width, width),
            f"{at}.mlp.gate_proj.weight": (inner, width),
            f"{at}.mlp.up_proj.weight": (inner, width),
            f"{at}.mlp.down_proj.weight": (width, inner),
            f"{at}.input_layernorm.weight": (width,),
            f"{at}.post_attention_layernorm.weight": (width,),
        })  # fmt: skip
    config.save_pretrained(folder)
    return total


def peak_bytes() -> int:
    """The high-water mark of this program alone: `getrusage` remembers whoever started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def step(folder: Path, name: str, length: int) -> dict[str, float]:
    """`bank`, or an estimator; in a process of its own."""
    import numpy as np
    import torch

    from evaluation.arithmetic import choose_dtype
    from evaluation.assembly import AssembledModel
    from quantization.adapter import describe
    from quantization.bank import Bank
    from quantization.checkpoints import resolve
    from quantization.quantizers import QUANTIZERS
    from quantization.schemes import Scheme
    from sensitivity import ESTIMATORS as KNOWN
    from sensitivity import Share, Work

    dtype, _ = choose_dtype()
    checkpoint = resolve(str(folder))
    layout = describe(checkpoint)
    schemes = [Scheme(scheme) for scheme in SCHEMES]
    choices = [schemes if u.layer is not None else [Scheme("bf16")] for u in layout.units]
    bank = Bank(checkpoint, layout, QUANTIZERS["rtn"], dtype, packed=True)
    before, start = peak_bytes(), time.perf_counter()
    found: dict[str, float] = {"before_bytes": before}
    if name == "bank":
        bank.build(choices)
    else:
        chunks = np.random.default_rng(0).integers(
            0, layout.units[0].sites[0].shape[0], (CHUNKS, length)
        )
        share = Share((0, len(layout.units)), (0, CHUNKS))
        work = Work(layout, length, dtype.itemsize)
        found["forecast_bytes"] = KNOWN[name].forecast_bytes(choices, share, work)
        model = AssembledModel(bank, torch.device("cpu"))
        table = KNOWN[name].score(model, chunks, choices, share).mean()
        assert np.isfinite(table[~np.isnan(table)]).all()
    return {**found, "peak_bytes": peak_bytes(), "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(step(given.folder, given.step, given.length)))
        return
    weights = write_checkpoint(given.folder, given.layers, given.width)
    print(
        f"{weights / 1e9:.2f} billion weights, {CHUNKS} x {given.length} tokens, {', '.join(SCHEMES)}"
    )
    results: dict[str, object] = {"weights": weights, "tokens": CHUNKS * given.length}
    for name in ("bank", *ESTIMATORS):
        command = [sys.executable, __file__, str(given.folder), "--step", name,
                   "--length", str(given.length)]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        results[name] = row
        forecast = row.get("forecast_bytes")
        print(
            f"{name:<14} peak {row['peak_bytes'] / 1e9:6.2f} GB resident"
            + (
                f" (forecast {forecast / 1e9:.2f} over {row['before_bytes'] / 1e9:.2f})"
                if forecast
                else ""
            )
            + f", {row['seconds']:.0f} s",
            flush=True,
        )
        if given.json:
            given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
