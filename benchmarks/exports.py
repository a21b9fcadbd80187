"""Exports of the demo model: do they load, are the bytes those predicted, and how long do they take?

One mixed map a target, its units in turns over a menu of what the target serves. Each export is
written from a packed bank, read back by the target's own loader, and compared on the same chunks;
writing is timed beside copying the files that came of it.

    python benchmarks/exports.py [--model demo] [--targets gguf,gptq] [--text FILE] [--json PATH]

With $BITFRONT_VLLM set, vLLM loads what it can of them, too; on a CPU it has kernels for fewer schemes
(--menu int4-g64-bf16,int8-channel-bf16/int8-token).
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bitfront.config import DEMO
from bitfront.demo import demo_model
from engines import ENGINES, Export, load_engine, load_target
from evaluation.arithmetic import choose_dtype
from evaluation.evaluator import Evaluator
from evaluation.texts import TextRequest, consecutive
from quantization.adapter import describe
from quantization.bank import Bank
from quantization.checkpoints import load_tokenizer, resolve
from quantization.precision_map import ModelEntry, build_map
from quantization.quantizers import QUANTIZERS
from quantization.schemes import FULL_PRECISION, Scheme

MENUS = {
    "safetensors": ("int4-g64", "int3-g64", "int8-channel"),
    "packed": ("int4-g64", "int3-g32", "nf4-g64", "int8-channel"),
    "gguf": ("gguf-q4_K", "gguf-q6_K", "int4-g32", "gguf-q8_0"),
    "compressed-tensors": ("int4-g64-bf16", "int3-g32-bf16", "fp8-e4m3-channel", "nvfp4"),
    "torchao": ("int4-g64-bf16", "int6-g32-bf16", "fp8-e4m3-channel"),
    "gptq": ("int4-g64", "int8-g64", "int4-g32"),
    "mlx": ("int4-g64-bf16", "int6-g64-bf16", "int3-g32-bf16"),
}
"""Without int4-g32-asym and q4_1: the demo model's weights lie on their grid."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--targets", default=",".join(MENUS))
    parser.add_argument("--menu", help="schemes instead of each target's own")
    parser.add_argument("--text", default="python-docs")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    checkpoint = resolve(demo_model() if arguments.model == DEMO else arguments.model)
    request = TextRequest(arguments.text, arguments.chunks, 512)
    chunks = consecutive(load_tokenizer(checkpoint), request).ids
    rows = []
    for name in arguments.targets.split(","):
        menu = arguments.menu.split(",") if arguments.menu else MENUS[name]
        rows.append(measured(checkpoint, name, menu, chunks))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"exports": rows}, indent=1) + "\n")


def measured(
    checkpoint: object, name: str, names: Sequence[str], chunks: np.ndarray
) -> dict[str, object]:
    target = load_target(name)
    rules = load_engine(target.engine) if target.engine in ENGINES else None
    layout = describe(checkpoint)
    menu = [Scheme.parse(scheme) for scheme in names]
    pinned = Scheme(FULL_PRECISION)
    inner = [unit for unit in layout.units if unit.layer is not None]
    of = {unit.name: menu[i % len(menu)] for i, unit in enumerate(inner)}
    schemes = [of.get(unit.name, pinned) for unit in layout.units]
    dtype = choose_dtype("auto")[0]
    with tempfile.TemporaryDirectory() as folder:
        values, bank = (
            Bank(checkpoint, layout, QUANTIZERS["rtn"], dtype, Path(folder, "bank"), packed=packed)
            for packed in (False, True)
        )
        for one in (values, bank):
            one.build([[scheme] for scheme in schemes])
        losses = [Evaluator(values, torch.device("cpu")).measure(schemes, ids) for ids in chunks]
        evaluator = Evaluator(bank, torch.device("cpu"))
        kl = sum(loss.kl_sum for loss in losses) / sum(loss.tokens for loss in losses)
        entry = ModelEntry(name=checkpoint.name, weights_hash=checkpoint.weights_hash)
        pairs = [(scheme.weight, scheme.activation) for scheme in schemes]
        export = Export(build_map(layout, pairs, entry, {}), evaluator, chunks, kl)
        out = Path(folder, "out")
        out.mkdir()
        start = time.perf_counter()
        target.write(export, out)
        writing = time.perf_counter() - start
        found = target.check(export, out)
        start = time.perf_counter()
        shutil.copytree(out, Path(folder, "copy"))
        copying = time.perf_counter() - start
    return {
        "target": name, "menu": [*names], "served_by_rules": rules.name if rules else None,
        "measured_kl": kl, "reloaded_kl": found["reloaded_kl"],
        "kl_ratio": found["reloaded_kl"] / kl, "tensor_bytes": found.get("weight_bytes"),
        "vllm": found.get("vllm"),
        "write_seconds": writing, "copy_seconds": copying, "write_over_copy": writing / copying,
    }  # fmt: skip


if __name__ == "__main__":
    main()
