"""What `query`, `jobs` and `formats` print."""

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bitfront.answering import Limits, answer
from bitfront.console import print_json, print_table
from bitfront.fronts import Front, load_front
from bitfront.sizes import show_bytes, show_seconds
from cost_models.memory import PHASES, Phase
from engines import target_of
from quantization.errors import BitfrontError
from store.database import Store
from store.queries import find_job, list_jobs

MOST_ROWS = 10**9

if TYPE_CHECKING:
    from quantization.formats import Format  # torch


def run_query(
    store: Store,
    job_id: int | None,
    limits: Limits,
    batch: int | None,
    context: int | None,
    as_json: bool,
) -> None:
    """Print the best point of a job under constraints; raises `NothingFitsError`.

    Without a workload it is the job's, whose activations are known and counted.
    """
    found = answer(load_front(store, find_job(store, job_id)), limits, batch, context)
    if as_json:
        print_json(found.to_json())
        return
    front, point, taken = found.front, found.point, found.footprint
    cache, activations, workload = taken.cache_bytes, taken.activation_bytes, taken.workload
    ranks = taken.sharing.ranks
    table = Table("what", "value", title=f"Best of job {front.job.id}: point {point.id}")
    rows = {
        "average bits": f"{point.average_bits:.4f}",
        "weights": f"{show_bytes(point.weight_bytes)} ({point.weight_bytes:,} bytes)",
        f"memory at {workload.batch} x {workload.context} tokens"
        + (f", each of {ranks} devices" if ranks > 1 else ""): f"{show_bytes(found.memory_bytes)} "
        f"(KV cache {show_bytes(cache)}"
        + (f", activations {show_bytes(activations)})" if activations else ")"),
        "KL, nats per token": f"{point.kl:.5f} ({point.kl_low:.5f} to {point.kl_high:.5f})",
        "perplexity": f"{point.perplexity:.3f} (unquantized {front.reference_perplexity or 0:.3f})",
        **{f"{phase} latency": show_seconds(seconds) for phase, seconds in found.seconds.items()},
        **_request(front, found.seconds),
        "control": point.control or "no",
        "take it": f"bitfront export {front.job.id} --point {point.id} --to {_target(front)} -o DIR",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    print_table(table)


def _request(front: Front, took: Mapping[Phase, float]) -> dict[str, str]:
    """A prompt and its answer, where both were asked for."""
    if len(took) < len(PHASES):
        return {}
    prompt, generated = (front.job.facts["times"]["workload"][k] for k in ("prompt", "generated"))
    seconds = took["prefill"] + generated * took["decode"]
    return {f"a request of {prompt} and {generated} tokens": show_seconds(seconds)}


def _target(front: Front) -> str:
    """What the job's engine loads."""
    serving = front.job.config.get("serving") or {}
    return target_of(serving.get("engine"))


def show_jobs(store: Store, as_json: bool) -> None:
    """Print all jobs."""
    rows: list[dict[str, Any]] = [
        {
            "job": job.id,
            "model": name,
            "state": job.state,
            "created_at": job.created_at.isoformat(),
            "updated_at": job.updated_at.isoformat(),
            "error": job.error,
        }
        for job, name in list_jobs(store)
    ]
    if as_json:
        print_json(rows)
        return
    table = Table("job", "model", "state", "updated", "error")
    for row in rows:
        table.add_row(
            str(row["job"]), row["model"], row["state"], row["updated_at"][:19], row["error"] or ""
        )
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
