"""What commands print: tables for people on stdout, JSON for programs, remarks on stderr."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from bitfront import latency
from bitfront.fronts import Front
from bitfront.sizes import show_bytes, show_seconds
from store.tables import Job

errors = Console(stderr=True, soft_wrap=True)


def print_json(document: Any) -> None:
    """A document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def print_table(table: Table) -> None:
    """A table on stdout, in full width when it isn't a terminal."""
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=140)
    console.print(table)


def front_table(front: Front) -> Table:
    """A front as a table."""
    job = front.job
    table = Table(
        title=f"Job {job.id}: {front.model.name}, {job.state}",
        caption=_caption(front),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("point", justify="right")
    table.add_column("bits", justify="right")
    table.add_column("size", justify="right")
    table.add_column("KL, nats/token (95 %)", justify="right")
    table.add_column("perplexity", justify="right")
    table.add_column("predicted", justify="right")
    timed = bool(job.facts.get("times"))
    if timed:
        table.add_column("a token", justify="right")
        table.add_column("prompt", justify="right")
    table.add_column("what")
    for p in front.points:
        table.add_row(
            str(p.id),
            f"{p.average_bits:.3f}",
            show_bytes(p.weight_bytes),
            f"{p.kl:.4f} ({p.kl_low:.4f} to {p.kl_high:.4f})",
            f"{p.perplexity:.2f}",
            "" if p.predicted_kl is None else f"{p.predicted_kl:.4f}",
            *(_times(job, p.map_hash) if timed else ()),
            ("front  " if p.on_front else "       ") + front.candidates[p.id].origin.split(",")[0],
            style=None if p.on_front else "dim",
        )
    return table


def _times(job: Job, map_hash: str) -> list[str]:
    found = [latency.seconds(job, map_hash, phase) for phase in ("decode", "prefill")]
    return ["" if seconds is None else show_seconds(seconds) for seconds in found]


def _caption(front: Front) -> str:
    facts = front.job.facts
    lines = []
    if front.reference_perplexity is not None:
        lines.append(f"Unquantized: perplexity {front.reference_perplexity:.2f} on the same text.")
    floor = facts.get("noise_floor")
    if floor is not None:
        lines.append(f"Noise floor of {facts['dtype']} arithmetic: {floor:.2g} nats per token.")
    if facts.get("transform"):
        lines.append(f"Channels rescaled by {facts['transform']}.")
    return " ".join(lines)
