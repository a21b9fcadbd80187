"""What claims, results and Ray cost beside the work: tasks of sleep over many workers.

    python benchmarks/scheduling.py                          # 4,000 tasks of 0.5 s on 64 workers
    python benchmarks/scheduling.py --store postgresql+psycopg://…
    python benchmarks/scheduling.py --measuring              # two one-thread workers against one

The goal is 95 % of the ideal with every claim and result persisted one by one, as a search does it,
and with real measurements 1.6 x the throughput on two cores.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from store.claims import new_owner
from store.database import Store
from store.queries import save_measurement
from store.tables import Measurement
from workers.pool import Task
from workers.ray_pool import Needs, RayPool
from workers.sharing import SharingPool, renewed


class Sleeper:
    """Work that needs no core."""

    def __init__(self, _: Any) -> None:
        """Nothing to load."""

    def sleep(self, seconds: float) -> float:
        """As if it measured."""
        time.sleep(seconds)
        return seconds


def row(key: str, seconds: float) -> Measurement:
    """A result as a search keeps it."""
    return Measurement(
        key=key, weights_hash="w" * 64, map_hash=key, chunk_hash="c" * 64, quantizer="rtn",
        dtype="float32", kl_sum=1.0, nll_sum=1.0, tokens=511, seconds=seconds,
    )  # fmt: skip


def sleeping(url: str, workers: int, tasks: int, seconds: float) -> dict[str, Any]:
    """Seconds from the first task to the last result, against the ideal."""
    store, owner = Store(url).open(), new_owner()
    stamp = owner.rpartition("/")[2][:8]
    wanted = [
        Task("sleep", {"seconds": seconds}, key=f"{stamp}-{i:055d}", table=Measurement)
        for i in range(tasks)
    ]
    inner = RayPool(None, needs=Needs(workers, cpus=0.01), make=Sleeper)
    with renewed(store, owner), SharingPool(inner, store, owner) as pool:
        for _ in pool.run(Task("sleep", {"seconds": 0.01}) for _ in range(workers)):
            pass  # every worker has worked once
        start, busy = time.perf_counter(), time.process_time()
        for outcome in pool.run(wanted):
            save_measurement(store, row(str(outcome.task.key), outcome.value))
        took, busy = time.perf_counter() - start, time.process_time() - busy
    with store.reading() as session:
        kept = session.query(Measurement).filter(Measurement.key.startswith(stamp)).count()
    assert kept == tasks
    ideal = tasks * seconds / workers
    return {
        "workers": workers, "tasks": tasks, "task_s": seconds, "took_s": took, "ideal_s": ideal,
        "share_of_ideal": ideal / took, "driver_cpu_s": busy, "store": url.split(":", maxsplit=1)[0],
    }  # fmt: skip


def measuring(tasks: int) -> dict[str, Any]:
    """Measurements a second of the demo model: two workers of a thread each, against one."""
    from bitfront.config import load_config
    from bitfront.pipeline import spec_of
    from bitfront.plan import make_plan

    plan = make_plan(load_config("demo", None, {"menu": "int-sym-g64"}))
    spec = spec_of(plan, None)
    text, choices = plan.texts["search"], plan.choices
    schemes = tuple(row[len(row) // 2].name for row in choices)
    rates = {}
    for workers in (1, 2, 2, 1):
        with RayPool(spec, needs=Needs(workers, cpus=1)) as pool:
            jobs = [
                Task("measure", {"schemes": schemes, "ids": text.ids[i % len(text.ids)]})
                for i in range(tasks)
            ]
            for _ in pool.run(jobs[: 2 * workers]):
                pass
            start = time.perf_counter()
            for outcome in pool.run(jobs):
                assert outcome.error is None
            rates.setdefault(workers, []).append(tasks / (time.perf_counter() - start))
    best = {workers: max(found) for workers, found in rates.items()}
    return {"per_second": rates, "ratio": best[2] / best[1], "tasks": tasks}


def main() -> None:
    """Print what was asked for, and write it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", help="SQLAlchemy URL; by default an SQLite file of its own")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--tasks", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--measuring", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.measuring:
        found = measuring(24)
    else:
        with tempfile.TemporaryDirectory() as folder:
            url = given.store or f"sqlite:///{folder}/s.sqlite"
            found = sleeping(url, given.workers, given.tasks, given.seconds)
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
