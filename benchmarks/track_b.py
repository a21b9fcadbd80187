r"""Track B: the whole menu plays. The same bytes, any weight format of ours, under GPTQ.

A draft: no figure of it is recorded, and it has not been run to its end yet.

One search over formats and units from one text; on another text its maps meet, at equal bytes,
uniform GPTQ in groups of 64 and 32 and the maps that other allocators chose (integers in groups of
64), all quantized by our GPTQ from the same calibration text.

    python benchmarks/track_b.py --model DIR --text SEARCH_TEXT --heldout TEXT --minutes 15 \
        [--maps PEER.json ...] [--json PATH]
"""

import argparse
import json
from pathlib import Path

import numpy as np
from track_a import LENGTH, Searcher, plan_for

from bitfront.pipeline import spec_of
from evaluation.texts import TextRequest, consecutive
from quantization.checkpoints import load_tokenizer
from search.statistics import paired_difference
from workers.session import Session

# no asymmetric integers: the demo model was made of asymmetric groups of 32
MENU = (
    "int2-g16-spqr,int3-g16-spqr,int4-g16-spqr,int5-g16-spqr,int2-g32-fp8,int3-g32-fp8,"
    "int4-g32-fp8,squeezellm3,squeezellm4,int6-g32-fp8"
)
BITS = (3.0, 3.25, 3.5, 3.75, 4.25, 4.75, 5.0)
PEERS = "int2-g64,int3-g64,int4-g64,int6-g64,int8-g64,int3-g32,int4-g32"
CALIBRATION = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--minutes", type=float, default=15, help="of the search, banks excluded")
    parser.add_argument("--maps", type=Path, nargs="*", default=[])
    parser.add_argument("--bits", default=",".join(map(str, BITS)))
    parser.add_argument("--chunks", type=int, default=12, help="of the held-out text")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    bits = tuple(float(b) for b in given.bits.split(","))
    calibration = {"source": given.text, "chunks": CALIBRATION, "length": LENGTH}
    common = {"quantizer": "gptq", "texts.calibration": calibration}
    plan = plan_for(given.model, given.text, bits, 80, menu=MENU, **common)
    Session(spec_of(plan, None)).prepare()
    searcher = Searcher(plan, given.minutes, 0, from_now=True)
    best = searcher.search()
    size = TextRequest(given.heldout, given.chunks, LENGTH)
    chunks = consecutive(load_tokenizer(plan.checkpoint), size).ids
    rows = []
    for kind, maps in (("estimator", searcher.first), ("bitfront", best)):
        for b, choice in maps.items():
            losses = [searcher.kl(choice, chunk) for chunk in chunks]
            rows.append((plan.average_bits(choice), f"{kind} at {b:g}", losses))
            print(f"{rows[-1][0]:.4f} {rows[-1][1]:<24} {np.mean(losses):.4f}", flush=True)
    rivals = plan_for(given.model, given.text, (8.0,), 80, menu=PEERS, **common)
    session = Session(spec_of(rivals, None))
    session.prepare()
    columns = {scheme.weight: c for c, scheme in enumerate(rivals.menu)}
    for name, choice in rival_maps(given.maps, rivals, columns):
        names = tuple(scheme.name for scheme in rivals.schemes(choice))
        found = [session.measure(names, chunk) for chunk in chunks]
        losses = [loss.kl_sum / loss.tokens for loss in found]
        rows.append((rivals.average_bits(choice), name, losses))
        print(f"{rows[-1][0]:.4f} {name:<24} {np.mean(losses):.4f}", flush=True)
    report(rows, len(best), given.json, searcher.log)


def rival_maps(
    paths: list[Path], plan: object, columns: dict[str, int]
) -> list[tuple[str, np.ndarray]]:
    """Uniform maps, and those of the files."""
    start = plan.offered.argmax(axis=1)
    found = []
    for scheme in ("int3-g64", "int3-g32", "int4-g64", "int4-g32"):
        choice = start.copy()
        choice[plan.open_units] = columns[scheme]
        found.append((f"uniform {scheme}", choice))
    for path in paths:
        given, choice = json.loads(path.read_text()), start.copy()
        for u in np.flatnonzero(plan.open_units):
            name = plan.layout.units[u].sites[0].name.removesuffix(".weight")
            choice[u] = columns[f"int{given[name]}-g64"]
        found.append((path.stem, choice))
    return found


def report(
    rows: list[tuple[float, str, list[float]]],
    ours: int,
    path: Path | None,
    log: dict[str, object],
) -> None:
    """Ours against the best rival that is no larger, in pairs."""
    results = []
    for _, name, losses in rows[ours : 2 * ours]:
        budget = float(name.split()[-1])
        rivals = [row for row in rows[2 * ours :] if row[0] <= budget + 1e-4]
        if not rivals:
            continue
        best = min(rivals, key=lambda row: float(np.mean(row[2])))
        tokens = np.ones(len(losses))
        over = paired_difference(np.array(losses), np.array(best[2]), tokens)
        ratio = float(np.mean(losses) / np.mean(best[2]))
        results.append({
            "bits": budget, "kl": float(np.mean(losses)), "best_rival": best[1],
            "rival_bits": best[0], "rival_kl": float(np.mean(best[2])), "ratio": ratio,
            "difference": [over.mean, over.low, over.high],
        })  # fmt: skip
        print(f"{budget:g} bits: {ratio:.3f} of {best[1]} ({best[0]:.4f} bits)")
    if path:
        kept = [{"bits": b, "name": n, "kl": float(np.mean(x))} for b, n, x in rows]
        document = {"menu": MENU, "against": results, "maps": kept, "search": log}
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
