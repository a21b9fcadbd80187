"""KV caches of the demo model: formats chosen layer by layer against one format for all, at equal bytes.

Weights stay exact, so that nothing but the cache is judged: a search over formats of keys and values
(`--menu bf16 --kv-menu …`), budgets at the sizes of the uniform caches and between, all measured on
text that the search hasn't seen.

    python benchmarks/kv_cache.py SEARCH_TEXT HELDOUT_TEXT [--refine N] [--json PATH]
"""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path

from bitfront.config import load_config
from bitfront.console import errors
from bitfront.fronts import Front, Point, load_front, losses, quality_key
from bitfront.pipeline import run_search
from bitfront.plan import make_plan
from bitfront.progress import Lines
from bitfront.searching import open_pool
from search.statistics import paired_difference
from store.database import Store
from store.queries import find_job

FORMATS = ["int2-g32", "int3-g32", "int4-g32", "int5-g32", "int6-g32", "int8-g32", "bf16"]
CONTEXT = 4096


def compared(store: Store, front: Front, control: Point) -> dict[str, float] | None:
    """The best chosen cache that is no larger than a uniform one, in pairs."""
    rivals = [p for p in front.points if not p.control and p.size_bytes <= control.size_bytes]
    if not rivals:
        return None
    best = min(rivals, key=lambda p: p.kl)
    candidates = [front.candidates[p.id] for p in (best, control)]
    found = losses(store, quality_key(front.job), candidates, front.job.facts["chunks"]["heldout"])
    mine, theirs = (found[p.map_hash] for p in (best, control))
    gap = paired_difference(mine.kl_sums, theirs.kl_sums, mine.tokens)
    return {
        "cache_bytes": control.cache_bytes or 0, "bits": control.average_bits,
        "uniform_kl": control.kl, "chosen_kl": best.kl, "ratio": best.kl / control.kl,
        "difference_low": gap.low, "difference_high": gap.high,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("search")
    parser.add_argument("heldout")
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    texts = {
        f"texts.{role}": {"source": source, "chunks": chunks, "length": 512}
        for role, source, chunks in (
            ("calibration", given.search, 8),
            ("search", given.search, 4),
            ("heldout", given.heldout, 12),
        )
    }
    more = {
        "menu": {"schemes": ["bf16"], "pinned": {}}, "menu.cache": FORMATS,
        "serving.context": CONTEXT, "refinement.measurements": given.refine, "random_controls": 0,
    }  # fmt: skip
    plan = make_plan(load_config("demo", None, {**texts, **more}))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/s.sqlite").open()
        opener = partial(open_pool, address="none", workers=None)
        with Lines(errors) as progress:
            job = run_search(plan, store, opener, progress, os.environ.get("BITFRONT_CACHE"))
        front = load_front(store, find_job(store, job))
        rows = {}
        for point in front.points:
            found = compared(store, front, point) if point.control == "uniform" else None
            if found:
                name = front.candidates[point.id].origin.rpartition(" ")[2]
                rows[name] = found
                print(
                    f"{name:<10}{found['bits']:6.2f} bits  KL uniform {found['uniform_kl']:.5f}, "
                    f"chosen {found['chosen_kl']:.5f}, ratio {found['ratio']:.2f}"
                )
    result = {"context": CONTEXT, "estimator": front.job.facts["predicts"], "uniform": rows}
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
