r"""Track B: the whole menu plays. The same bytes, any weight format of ours, under YAQA.

One search over formats and units from one text. On another text its maps, and uniform ones of its
formats, meet at equal bytes the integers of others under GPTQ: uniform maps in groups of 64, 32 and 16
and the maps that other allocators chose (groups of 64).

    python benchmarks/track_b.py --model DIR --text SEARCH_TEXT --heldout TEXT --minutes 15 \
        --out DIR [--maps PEER.json ...] [--json PATH]
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from track_a import CALIBRATION, LENGTH, Searcher, plan_for

from bitfront.allocators import GIVEN, Contest, Entry, compare
from bitfront.console import errors
from bitfront.pipeline import spec_of
from bitfront.plan import Plan
from bitfront.progress import Lines
from evaluation.texts import TextRequest, consecutive
from quantization.checkpoints import load_tokenizer
from search.controls import uniform
from search.statistics import mean_interval
from store.database import Store
from workers.session import Session

MENU = "trellis2,trellis3,trellis4,trellis5,trellis6"
# feedback correlates a row's errors: what takes them for independent misleads
ESTIMATOR = "row-fisher"
BITS = (3.0, 3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 4.75, 5.0)
OURS = "yaqa"
# uniform int4-g64 and int3-g64: 0.163 and 0.623 under GPTQ, 0.252 and 0.888 under weighted rounding
RIVALS = ("gptq",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--minutes", type=float, default=15, help="of the search, banks excluded")
    parser.add_argument("--maps", type=Path, nargs="*", default=[])
    parser.add_argument("--menu", default=MENU)
    parser.add_argument("--estimator", default=ESTIMATOR)
    parser.add_argument("--bits", default=",".join(map(str, BITS)))
    parser.add_argument("--chunks", type=int, default=24, help="of the held-out text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    bits = tuple(float(b) for b in given.bits.split(","))
    ours, log = search(given, bits)
    store = Store(f"sqlite:///{given.out.resolve()}/measurements.sqlite").open()
    contest = Contest(
        given.model, given.heldout, tuple(given.maps), bits, given.chunks, LENGTH,
        calibration=given.text, random=0,
    )  # fmt: skip
    rivals = {}
    for quantizer in RIVALS:
        with Lines(errors) as progress:
            own = replace(contest, quantizer=quantizer)
            rivals[quantizer] = compare(own, store, "none", progress)
    document = {
        "menu": given.menu, "estimator": given.estimator, **judged(ours, rivals), "search": log
    }  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(document, indent=1) + "\n")


def search(
    given: argparse.Namespace, bits: tuple[float, ...]
) -> tuple[list[Entry], dict[str, Any]]:
    """The maps of one search, the estimator's and the refined ones, measured, and what it cost."""
    plan = plan_for(
        given.model, given.text, bits, 80, menu=given.menu, quantizer=OURS,
        estimators=[given.estimator],
        **{"texts.calibration": {"source": given.text, "chunks": CALIBRATION, "length": LENGTH}},
    )  # fmt: skip
    Session(spec_of(plan, None)).prepare()
    searcher = Searcher(plan, given.minutes, 0, from_now=True)
    problem = plan.problem(np.zeros(plan.offered.shape))
    maps = {f"estimator-{b:g}": (b, x) for b, x in searcher.first.items()}
    maps |= {f"bitfront-{b:g}": (b, x) for b, x in searcher.search().items()}
    for column, scheme in enumerate(plan.menu):
        if (flat := uniform(problem, column)) is not None:
            maps[f"uniform {scheme.weight}"] = plan.average_bits(flat), flat
    size = TextRequest(given.heldout, given.chunks, LENGTH)
    text = consecutive(load_tokenizer(plan.checkpoint), size)
    entries = []
    for name, (budget, choice) in maps.items():
        write(given.out, plan, name.replace(" ", "-"), choice)
        kl = [searcher.kl(choice, chunk) * (LENGTH - 1) for chunk in text.ids]
        interval = mean_interval(np.array(kl), np.full(len(kl), LENGTH - 1.0))
        bits_used = plan.average_bits(choice)
        entries.append(Entry(budget, name, GIVEN, bits_used, interval, None))
        print(f"{name:<18} {bits_used:.4f} bits, KL {interval.mean:.4f}", flush=True)
    return entries, searcher.log


def write(out: Path, plan: Plan, name: str, choice: np.ndarray) -> None:
    """A map as linear -> format."""
    found = {
        site.name.removesuffix(".weight"): scheme.weight
        for unit, scheme in zip(plan.layout.units, plan.schemes(choice), strict=True)
        for site in unit.sites
        if scheme.weight != "bf16"
    }
    (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def judged(ours: list[Entry], found: dict[str, list[Entry]]) -> dict[str, Any]:
    """Ours against the best rival that is no larger than the budget, whatever its quantizer."""
    rivals = [(entry, quantizer) for quantizer, entries in found.items() for entry in entries]
    results = []
    for entry in ours:
        smaller = [r for r in rivals if r[0].average_bits <= entry.budget + 1e-4]
        own = {"map": entry.name, "bits": entry.average_bits, "kl": asdict(entry.kl)}
        if not smaller:
            results.append({**own, "rival": None})
            continue
        best, quantizer = min(smaller, key=lambda r: r[0].kl.mean)
        ratio = entry.kl.mean / best.kl.mean
        results.append({
            **own, "rival": best.name, "rival_quantizer": quantizer, "rival_bits": best.average_bits,
            "rival_kl": asdict(best.kl), "ratio": ratio,
        })  # fmt: skip
        print(
            f"{entry.name:<16} {entry.average_bits:.4f} bits, KL {entry.kl.mean:.4f}: {ratio:.3f} of "
            f"{best.name} under {quantizer} ({best.average_bits:.4f} bits, {best.kl.mean:.4f})"
        )
    kept = [
        {"name": e.name, "quantizer": q, "bits": e.average_bits, "kl": asdict(e.kl)}
        for e, q in rivals
    ]
    return {"against": results, "rivals": kept}


if __name__ == "__main__":
    main()
