"""What commands print: tables for people on stdout, JSON for programs, remarks on stderr."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from bitfront.sizes import show_bytes, show_joules, show_seconds

errors = Console(stderr=True, soft_wrap=True)

SECONDS = {"decode_s": "a token", "prefill_s": "prompt"}
JOULES = {"decode_j": "energy a token", "prefill_j": "of a prompt"}
PREDICTED = "~: predicted, not measured."


def print_json(document: Any) -> None:
    """A document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def print_table(table: Table) -> None:
    """A table on stdout, in full width when it isn't a terminal."""
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=140)
    console.print(table)


def front_table(front: Mapping[str, Any]) -> Table:
    """A front (`documents.front_document`) as a table."""
    table = Table(
        title=f"Job {front['job']}: {front['model']}, {front['state']}",
        caption=_caption(front),
        caption_justify="left",
        title_justify="left",
    )
    points = front["points"]
    spent = [[k for k in keys if any(p.get(k) for p in points)] for keys in (SECONDS, JOULES)]
    size = "with KV cache" if any("cache_bytes" in p for p in points) else "size"
    for name in ("point", "bits", size, "KL, nats/token (95 %)", "perplexity", "predicted"):
        table.add_column(name, justify="right")
    for key in (key for keys in spent for key in keys):
        table.add_column({**SECONDS, **JOULES}[key], justify="right")
    table.add_column("what")
    for p in points:
        costs = [spending(p[k], p["times"], show_seconds) for k in spent[0]]
        costs += [spending(p[k], p["energy"], show_joules) for k in spent[1]]
        table.add_row(
            str(p["id"]),
            f"{p['average_bits']:.3f}",
            show_bytes(p.get("size_bytes", p["weight_bytes"])),
            f"{p['kl']:.4f} ({p['kl_low']:.4f} to {p['kl_high']:.4f})",
            f"{p['perplexity']:.2f}",
            "" if p["predicted_kl"] is None else f"{p['predicted_kl']:.4f}",
            *costs,
            ("front  " if p["on_front"] else "       ") + p["origin"].split(",")[0],
            style=None if p["on_front"] else "dim",
        )
    return table


def spending(value: float | None, how: str | None, show: Callable[[float], str]) -> str:
    """Seconds or joules of a point; those that nobody measured with a mark."""
    if value is None:
        return ""
    return show(value) if how == "measured" else f"~{show(value)}"


def show_front(front: Mapping[str, Any]) -> None:
    """Print a front and what it tells."""
    print_table(front_table(front))
    for finding in front["findings"]:
        errors.print(finding, highlight=False)


def _caption(front: Mapping[str, Any]) -> str:
    lines = []
    if front["reference_perplexity"] is not None:
        perplexity = front["reference_perplexity"]
        lines.append(f"Unquantized: perplexity {perplexity:.2f} on the same text.")
    floor = front["noise_floor"]
    if floor is not None:
        lines.append(f"Noise floor of {front['dtype']} arithmetic: {floor:.2g} nats per token.")
    kinds = {p[k] for p in front["points"] for k in ("times", "energy") if p.get(k)}
    if "predicted" in kinds:
        lines.append(PREDICTED)
    if front.get("transform"):  # a server of an older version says nothing of it
        lines.append(f"Channels rescaled by {front['transform']}.")
    return " ".join(lines)
