r"""Track B: the whole menu plays. The same bytes, any weight format of ours, under YAQA.

One search over formats and units from one text. On another text its maps meet, at equal bytes,
uniform maps in groups of 64, 32 and 16 and the maps that other allocators chose (integers in groups
of 64), which are measured under each of the quantizers that a rival could take.

    python benchmarks/track_b.py --model DIR --text SEARCH_TEXT --heldout TEXT --minutes 15 \
        --out DIR [--maps PEER.json ...] [--json PATH]
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from track_a import LENGTH, Searcher, plan_for

from bitfront.allocators import GIVEN, NULL, Contest, Entry, compare
from bitfront.console import errors
from bitfront.pipeline import spec_of
from bitfront.plan import Plan
from bitfront.progress import Lines
from store.database import Store
from workers.session import Session

# no asymmetric integers: the demo model was made of asymmetric groups of 32
MENU = (
    "int2-g16-spqr,int3-g16-spqr,int4-g16-spqr,int5-g16-spqr,int2-g32-fp8,int3-g32-fp8,"
    "int4-g32-fp8,squeezellm3,squeezellm4,int6-g32-fp8"
)
BITS = (3.0, 3.25, 3.5, 3.75, 4.25, 4.75, 5.0)
OURS = "yaqa"
RIVALS = ("gptq", "rtn-weighted")
CALIBRATION = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--minutes", type=float, default=15, help="of the search, banks excluded")
    parser.add_argument("--maps", type=Path, nargs="*", default=[])
    parser.add_argument("--menu", default=MENU)
    parser.add_argument("--bits", default=",".join(map(str, BITS)))
    parser.add_argument("--chunks", type=int, default=24, help="of the held-out text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    bits = tuple(float(b) for b in given.bits.split(","))
    maps, log = search(given, bits)
    store = Store(f"sqlite:///{given.out.resolve()}/measurements.sqlite").open()
    contest = Contest(
        given.model, given.heldout, (), bits, given.chunks, LENGTH,
        calibration=given.text, random=0,
    )  # fmt: skip
    found = {}
    for quantizer in dict.fromkeys((OURS, *RIVALS)):
        entered = (
            *(maps if quantizer == OURS else ()),
            *(given.maps if quantizer in RIVALS else ()),
        )
        controls: dict[str, Any] = {} if quantizer in RIVALS else {"bits": (3, 4), "finer": ()}
        with Lines(errors) as progress:
            own = replace(contest, maps=entered, quantizer=quantizer, **controls)
            found[quantizer] = compare(own, store, "none", progress)
    document = {"menu": given.menu, **judged(found, {m.stem for m in maps}), "search": log}
    if given.json:
        given.json.write_text(json.dumps(document, indent=1) + "\n")


def search(given: argparse.Namespace, bits: tuple[float, ...]) -> tuple[list[Path], dict[str, Any]]:
    """The maps of one search, the estimator's and the refined ones, and what it cost."""
    plan = plan_for(
        given.model, given.text, bits, 80, menu=given.menu, quantizer=OURS,
        **{"texts.calibration": {"source": given.text, "chunks": CALIBRATION, "length": LENGTH}},
    )  # fmt: skip
    Session(spec_of(plan, None)).prepare()
    searcher = Searcher(plan, given.minutes, 0, from_now=True)
    paths = [write(given.out, plan, f"estimator-{b:g}", x) for b, x in searcher.first.items()]
    paths += [write(given.out, plan, f"bitfront-{b:g}", x) for b, x in searcher.search().items()]
    return paths, searcher.log


def write(out: Path, plan: Plan, name: str, choice: np.ndarray) -> Path:
    """A map as linear -> format."""
    found = {
        site.name.removesuffix(".weight"): scheme.weight
        for unit, scheme in zip(plan.layout.units, plan.schemes(choice), strict=True)
        for site in unit.sites
        if scheme.weight != "bf16"
    }
    path = out / f"{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def judged(found: dict[str, list[Entry]], ours: set[str]) -> dict[str, Any]:
    """Ours against the best rival that is no larger, whatever its quantizer."""
    rivals = [
        (entry, quantizer)
        for quantizer in RIVALS
        for entry in found[quantizer]
        if entry.name not in ours and entry.kind != NULL
    ]
    results = []
    for entry in (e for e in found[OURS] if e.kind == GIVEN and e.name in ours):
        budget = float(entry.name.rsplit("-", 1)[1])
        smaller = [r for r in rivals if r[0].average_bits <= budget + 1e-4]
        if not smaller:
            continue
        best, quantizer = min(smaller, key=lambda r: r[0].kl.mean)
        ratio = entry.kl.mean / best.kl.mean
        results.append({
            "map": entry.name, "bits": entry.average_bits, "kl": asdict(entry.kl),
            "rival": best.name, "rival_quantizer": quantizer, "rival_bits": best.average_bits,
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
