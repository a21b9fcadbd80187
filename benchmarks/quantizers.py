"""What each quantizer makes of the demo model: KL and perplexity on a text, and seconds.

Each quantizer puts all linears into each format; embedding and head stay. The statistics come from
another text than the figures. Seconds are of quantizing alone, all linears of the model:
round-to-nearest beside GPTQ, format by format.

    python benchmarks/quantizers.py TEXT [--calibration TEXT] [--quantizers rtn,gptq] [--formats ...]
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bitfront.config import load_config
from bitfront.pipeline import spec_of
from bitfront.plan import make_plan
from quantization.checkpoints import load_model
from quantization.formats import FORMATS
from quantization.quantizers import QUANTIZERS, needs
from quantization.statistics import Statistics
from quantization.units import Site
from workers.session import Session, SessionSpec

TWELVE = (
    "int2-g32,int3-g32,int4-g32,int4-g64-asym,int6-g64,int8-channel,fp8-e4m3,mxfp4,mxfp6,nvfp4,"
    "nf4-g64,dialectfp4-b32"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--quantizers", default="rtn,rtn-mse,rtn-weighted,gptq")
    parser.add_argument("--formats", default="int4-g64,int3-g64")
    parser.add_argument("--time", default=TWELVE, help="formats to time; empty for none")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    formats = arguments.formats.split(",")
    result: dict[str, object] = {"quality": []}
    texts = (arguments.text, arguments.calibration)
    for quantizer in filter(None, arguments.quantizers.split(",")):
        for row in quality(quantizer, formats, *texts, arguments.chunks):
            print(json.dumps(row), flush=True)
            result["quality"].append(row)  # type: ignore[attr-defined]
    if arguments.time:
        result["seconds"] = seconds(arguments.time.split(","))
        print(json.dumps(result["seconds"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def quality(
    quantizer: str, formats: list[str], text: str, calibration: str, chunks: int
) -> Iterator[dict]:
    """KL in nats a token and perplexity of uniform maps."""
    overrides = {
        "menu": ",".join([*formats, "bf16"]),
        "quantizer": quantizer,
        "texts.calibration.source": calibration,
        "texts.calibration.chunks": 32,
        "texts.calibration.length": 512,
        "texts.heldout.source": text,
        "texts.heldout.chunks": chunks,
        "texts.heldout.length": 512,
    }
    plan = make_plan(load_config("demo", None, overrides))
    spec = spec_of(plan, os.environ.get("BITFRONT_CACHE"))
    session = Session(SessionSpec(**{**vars(spec), "threads": os.cpu_count() or 1}))
    ids = plan.texts["heldout"].ids
    start = time.perf_counter()
    session.prepare()
    bank_s = time.perf_counter() - start
    for name in [None, *formats]:
        if name is None and quantizer != "rtn":
            continue
        schemes = name and tuple(name if name in row else row[0] for row in spec.choices)
        found = [session.measure(schemes, chunk) for chunk in ids]
        tokens = sum(m.tokens for m in found)
        yield {
            "quantizer": quantizer, "format": name or "unquantized",
            "kl": round(sum(m.kl_sum for m in found) / tokens, 5),
            "perplexity": round(float(np.exp(sum(m.nll_sum for m in found) / tokens)), 3),
            "bank_s": round(bank_s, 1),
        }  # fmt: skip


def seconds(formats: list[str]) -> dict[str, object]:
    """Seconds of quantizing all linears of the demo model, format by format."""
    plan = make_plan(load_config("demo", None, {"quantizer": "gptq"}))
    spec = spec_of(plan, os.environ.get("BITFRONT_CACHE"))
    session = Session(SessionSpec(**{**vars(spec), "threads": os.cpu_count() or 1}))
    session.prepare()
    statistics = Statistics(plan.statistics)
    parameters = load_model(plan.checkpoint, torch.float32).state_dict()
    alike: dict[tuple[int, ...], list[Site]] = {}
    for site in (s for u in plan.layout.units if u.layer is not None for s in u.stored):
        alike.setdefault(site.shape, []).append(site)
    taken: dict[str, dict[str, float]] = {"rtn": {}, "gptq": {}}
    for name in formats:
        for quantizer, times in taken.items():
            engine, format = QUANTIZERS[quantizer], FORMATS[name]
            total = 0.0
            for sites in (s[i : i + 8] for s in alike.values() for i in range(0, len(s), 8)):
                known = [statistics.of(site, needs(engine, format)) for site in sites]
                weights = [parameters[site.parameter] for site in sites]
                start = time.perf_counter()
                engine.quantize_alike(weights, format, known)
                total += time.perf_counter() - start
            times[name] = round(total, 2)
    rtn, gptq = sum(taken["rtn"].values()), sum(taken["gptq"].values())
    return {
        **taken, "rtn_total": round(rtn, 1), "gptq_total": round(gptq, 1),
        "ratio": round(gptq / rtn, 2), "longest_gptq": max(taken["gptq"].values()),
    }  # fmt: skip


if __name__ == "__main__":
    main()
