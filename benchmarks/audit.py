"""The audit of all estimators on the demo model: figures for `benchmarks/results/audit.json`.

Symmetric integers of 2, 3, 4, 6 and 8 bits in groups of 64, round to nearest; calibrated on one
text, measured on another. Run again to resume; `--estimators` adds some to what the store has.

    python benchmarks/audit.py CALIBRATION_TEXT MEASURED_TEXT [--store URL] [--json PATH]
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

from bitfront.audit_views import audit_remarks, audit_table
from bitfront.auditing import AuditOptions, run_audit
from bitfront.config import load_config
from bitfront.console import errors, print_table
from bitfront.plan import make_plan
from bitfront.progress import Lines
from bitfront.searching import open_pool
from store.database import Store, default_url

MENU = "int2-g64,int3-g64,int4-g64,int6-g64,int8-g64"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calibration")
    parser.add_argument("measured")
    parser.add_argument("--store", default=default_url())
    parser.add_argument("--estimators", default="")
    parser.add_argument("--calibration-chunks", type=int, default=8)
    parser.add_argument("--measured-chunks", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--mixed", type=int, default=100)
    parser.add_argument("--equal", type=int, default=60)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    texts = {
        f"texts.{role}": {"source": source, "chunks": chunks, "length": given.length}
        for role, source, chunks in (
            ("calibration", given.calibration, given.calibration_chunks),
            ("search", given.measured, given.measured_chunks),
            ("heldout", given.measured, 2),
        )
    }
    plan = make_plan(load_config("demo", None, {"menu": MENU, "estimators": ["fisher"], **texts}))
    names = tuple(name for name in given.estimators.split(",") if name)
    options = AuditOptions(
        names, given.mixed, given.equal, between=(3.0, 5.0), equal_bits=(3.25, 4.25)
    )
    store = Store(given.store).open()
    with Lines(errors) as progress:
        workers = partial(open_pool, address="local", workers=None)
        job = run_audit(plan, store, workers, progress, options, os.environ.get("BITFRONT_CACHE"))
    audit = job.facts["audit"]
    print_table(audit_table(job.id, audit))
    for line in audit_remarks(audit):
        print(line)
    if given.json:
        document = {"arithmetic": plan.dtype, **audit, "text": Path(given.measured).name}
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
