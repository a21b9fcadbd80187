"""What `query`, `jobs` and `formats` print."""

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bitfront.answering import Limits
from bitfront.console import PREDICTED, errors, print_json, print_table, spending
from bitfront.service import Desk
from bitfront.sizes import show_bytes, show_joules, show_seconds
from cost_models.memory import PHASES
from engines import target_of
from quantization.errors import BitfrontError

MOST_ROWS = 10**9
MOST_JOBS = 200
JOB_COLUMNS = (
    "model", "state", "engine", "points", "submitted_by", "created_at", "updated_at", "error",
)  # fmt: skip

if TYPE_CHECKING:
    from quantization.formats import Format  # torch


def run_query(
    desk: Desk,
    limits: Limits,
    where: dict[str, Any],
    as_json: bool,
) -> None:
    """Print the best point under constraints; raises `NothingFitsError`.

    Args:
        desk: a store's or a server's.
        limits: by name, None is none.
        where: `job` or `model`, else the latest job; and `batch` and `context` of a workload, which
            is by default the job's, whose activations are known and counted.
        as_json: print the document.
    """
    if where["job"] is None and where["model"] is None:
        where = {**where, "job": desk.job(None)["id"]}
    found = desk.query(limits, **where)
    if as_json:
        print_json(found)
        return
    point, workload = found["point"], found["workload"]
    activations, ranks = found["activation_bytes"], workload.get("tensor_parallel", 1)
    took = {phase: found[f"{phase}_s"] for phase in PHASES if f"{phase}_s" in found}
    spent = {phase: found[f"{phase}_j"] for phase in PHASES if f"{phase}_j" in found}
    table = Table("what", "value", title=f"Best of job {found['job']}: point {point['id']}")
    rows = {
        "average bits": f"{point['average_bits']:.4f}",
        "weights": f"{show_bytes(point['weight_bytes'])} ({point['weight_bytes']:,} bytes)",
        f"memory at {workload['batch']} x {workload['context']} tokens"
        + (f", each of {ranks} devices" if ranks > 1 else ""): show_bytes(found["memory_bytes"])
        + f" (KV cache {show_bytes(found['kv_cache_bytes'])}"
        + (f", activations {show_bytes(activations)})" if activations else ")"),
        "KL, nats per token": f"{point['kl']:.5f} ({point['kl_low']:.5f} to {point['kl_high']:.5f})",
        "perplexity": f"{point['perplexity']:.3f} "
        f"(unquantized {found['reference_perplexity'] or 0:.3f})",
        **{
            f"{phase} latency": spending(seconds, point["times"], show_seconds)
            for phase, seconds in took.items()
        },
        **{
            f"{phase} energy": spending(joules, point["energy"], show_joules)
            for phase, joules in spent.items()
        },
        **_request(found),
        "control": point["control"] or "no",
        "take it": f"bitfront export {found['job']} --point {point['id']} "
        f"--to {target_of(found['engine'])} -o DIR",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    if "predicted" in {point["times"], point["energy"]}:
        table.caption = PREDICTED
    print_table(table)
    for other in found["others"]:
        errors.print(
            f"Measured on other text: point {other['point']['id']} of job {other['job']}, "
            f"KL {other['point']['kl']:.5f}.",
            highlight=False,
        )


def _request(found: Mapping[str, Any]) -> dict[str, str]:
    """A prompt and its answer, where both were asked for."""
    if not (whole := found["request"]):
        return {}
    tokens = f"{whole['prompt']} and {whole['generated']} tokens"
    seconds = spending(whole["seconds"], found["point"]["times"], show_seconds)
    return {f"a request of {tokens}": seconds}


def show_jobs(desk: Desk, as_json: bool) -> None:
    """Print the newest jobs: all of a store, a page of a server's."""
    rows = [
        {"job": found["id"], **{name: found[name] for name in JOB_COLUMNS}}
        for found in desk.jobs(limit=MOST_JOBS)["jobs"]
    ]
    if as_json:
        print_json(rows)
        return
    if not rows:
        errors.print("No jobs yet: bitfront search MODEL makes one.", highlight=False)
        return
    table = Table("job", "model", "state", "engine", "points", "updated", "error")
    for row in rows:
        table.add_row(
            str(row["job"]), row["model"], row["state"], row["engine"] or "", str(row["points"]),
            row["updated_at"][:19], row["error"] or "",
        )  # fmt: skip
    print_table(table)


def show_formats(pattern: str, shape: str, as_json: bool) -> None:
    """Print the formats whose name or family matches, with their bytes for ROWSxCOLUMNS."""
    from quantization.formats import FORMATS

    entries = [format_document(FORMATS[name], parse_shape(shape)) for name in matching(pattern)]
    if as_json:
        print_json(entries)
        return
    table = Table("name", "family", "bits", "bytes", "kernels", "calibrated with", "applies")
    for e in entries:
        table.add_row(
            e["name"], e["family"],
            f"{e['bits_per_weight']:.4f}" if e["applies"] else "",
            f"{e['nbytes']:,}" if e["applies"] else "",
            ", ".join(e["kernels"]) or "simulated", ", ".join(e["needs"]),
            e["refusal"] or (f"stored as {e['stored_as']}" if e["stored_as"] else "yes"),
        )  # fmt: skip
    print_table(table)


def parse_shape(text: str) -> tuple[int, int]:
    """ROWSxCOLUMNS; raises `BitfrontError` where it is none."""
    try:
        rows, columns = (int(part) for part in text.lower().split("x"))
        if not (1 <= rows <= MOST_ROWS and 1 <= columns <= MOST_ROWS):
            raise ValueError
    except ValueError:
        raise BitfrontError(f"'{text}' is not a shape such as 4096x11008") from None
    return rows, columns


def matching(pattern: str) -> list[str]:
    """The formats whose name or family matches; raises `UnknownNameError` where none does."""
    from quantization.formats import FORMATS

    chosen = [
        name
        for name in FORMATS
        if fnmatch(name, pattern)
        or pattern in (FORMATS[name].family, *FORMATS[name].family.split("+"))
    ]
    if not chosen:
        FORMATS[pattern]  # says so, with the nearest names
    return chosen


def format_document(format: "Format", shape: tuple[int, int]) -> dict[str, Any]:
    """A format for a shape, as `bitfront formats --json` prints it."""
    from quantization.formats.gguf import GGUFFormat
    from quantization.kernels import kernel_devices

    native = {"bf16": ["any device"], "gguf": ["llama.cpp"]}
    kernels = native.get(format.name) or native.get(format.family) or kernel_devices(format, shape)
    refusal = format.refusal(shape)
    stored = None
    if isinstance(format, GGUFFormat) and not refusal:
        stored = f"gguf-{format.stored_type(shape)}"
    return {
        "name": format.name,
        "family": format.family,
        "bits_per_weight": None if refusal else format.bits_per_weight(shape),
        "nbytes": None if refusal else format.nbytes(shape),
        "kernels": kernels,
        "needs": sorted(format.needs),
        "applies": refusal is None,
        "refusal": refusal,
        "stored_as": None if stored == format.name else stored,
    }
