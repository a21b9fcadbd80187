"""What the peers' scripts share: arguments, the text, linears and the form of a map."""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS, GROUP, SCALE_BITS = (2, 3, 4, 6, 8), 64, 16
SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def arguments(description: str, chunks: int, length: int, **more: Any) -> argparse.Namespace:
    """MODEL_DIR TEXT OUT_DIR, and how much of the text."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", default="3.25,3.5,3.75,4.25,4.75,5.25")
    parser.add_argument("--chunks", type=int, default=chunks)
    parser.add_argument("--length", type=int, default=length)
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    given.bits = [float(b) for b in given.bits.split(",")]
    return given


def load(path: str) -> torch.nn.Module:
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def tokens(given: argparse.Namespace) -> torch.Tensor:
    """The beginning of the text, chunks x length."""
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ids = tokenizer(Path(given.text).read_text(), return_tensors="pt").input_ids[0]
    return ids[: given.chunks * given.length].reshape(given.chunks, given.length)


def linears(model: torch.nn.Module) -> dict[str, int]:
    """Weights of each linear inside the blocks."""
    found = model.named_modules()
    return {n: m.weight.numel() for n, m in found
            if isinstance(m, torch.nn.Linear) and "lm_head" not in n}  # fmt: skip


def exact_bits(sizes: dict[str, int], bits: dict[str, int]) -> float:
    """Average bits with the groups' scales."""
    return sum(sizes[n] * (b + SCALE_BITS / GROUP) for n, b in bits.items()) / sum(sizes.values())


def fits(sizes: dict[str, int], bits: dict[str, int], budget: float) -> bool:
    """Whether a map is within the budget, but for rounding."""
    return exact_bits(sizes, bits) <= budget + 1e-9


def write(out: Path, name: str, budget: float, sizes: dict[str, int], bits: dict[str, int]) -> None:
    """One file a map: linear -> bits; refused off the menu, over the budget, or if fused differ."""
    assert {*bits.values()} <= {*BITS}, sorted({*bits.values()})
    assert all(len({bits[n] for n in names}) == 1 for names in fused(sizes)), "fused linears differ"
    assert fits(sizes, bits, budget), f"{exact_bits(sizes, bits)} bits are more than {budget}"
    path = out / f"{name}-{budget:g}.json"
    path.write_text(json.dumps({n: int(bits[n]) for n in sizes}, indent=1) + "\n")
    print(f"{path.name}: {exact_bits(sizes, bits):.4f} bits", flush=True)


def fused(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names of linears that engines load as one."""
    layers: dict[str, dict[str, str]] = {}
    for name in sizes:
        parent, own = name.rsplit(".", 1)
        layers.setdefault(parent, {})[own] = name
    for inside in layers.values():
        for names in SHARED:
            if together := [inside.pop(n) for n in names if n in inside]:
                yield together
        yield from ([name] for name in inside.values())
