"""What `query`, `jobs` and `formats` print."""

from collections.abc import Mapping
from fnmatch import fnmatch
from math import inf
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bitfront import latency
from bitfront.console import print_json, print_table
from bitfront.fronts import Constraints, Front, best_point, layout_of, load_front
from bitfront.sizes import show_bytes, show_seconds
from cost_models.memory import PHASES, Phase, Sharing, Workload, kv_cache_bytes
from engines import target_of
from quantization.errors import BitfrontError
from store.database import Store
from store.queries import find_job, list_jobs

if TYPE_CHECKING:
    from quantization.formats import Format  # torch


class NothingFitsError(BitfrontError):
    """A query that no measured point answers."""


def run_query(
    store: Store,
    job_id: int | None,
    limits: dict[str, float | None],
    batch: int | None,
    context: int | None,
    as_json: bool,
) -> None:
    """Print the best point of a job under constraints; raises `NothingFitsError`.

    Without a workload it is the job's, whose activations are known and counted.
    """
    front = load_front(store, find_job(store, job_id))
    layout = layout_of(front.job, front.model)
    if (limits["decode_s"] or limits["prefill_s"]) and not front.job.facts.get("times"):
        raise NothingFitsError(
            f"job {front.job.id} has no latency: search with --engine llama.cpp, then ask again"
        )
    if limits["memory_bytes"] is not None and not layout.cache:
        raise NothingFitsError(
            "this model's KV cache is unknown (its forward pass could not be traced), so its "
            "memory is, too; constrain --max-size instead"
        )
    known = front.job.facts.get("memory", {"workload": {}, "activation_bytes": 0})
    given = {k: v for k, v in {"batch": batch, "context": context}.items() if v is not None}
    workload = Workload(**{**known["workload"], **given})
    sharing = Sharing(**known.get("sharing", {}))
    cache = sharing.cache(kv_cache_bytes(layout, workload))
    activations = 0 if given else known["activation_bytes"]
    bounds = {name: inf if limit is None else limit for name, limit in limits.items()}
    point, why_not = best_point(front, Constraints(**bounds), cache + activations, sharing)
    if point is None:
        raise NothingFitsError(str(why_not))
    memory = sharing.weights(point.weight_bytes) + cache + activations
    took = {
        phase: seconds
        for phase in PHASES
        if (seconds := latency.seconds(front.job, point.map_hash, phase)) is not None
    }
    shared = {} if sharing.ranks == 1 else {"tensor_parallel": sharing.ranks}
    if as_json:
        found = next(p for p in front.to_json()["points"] if p["id"] == point.id)
        print_json({
            "job": front.job.id, "model": front.model.name, "point": found,
            "memory_bytes": memory, "kv_cache_bytes": cache, "activation_bytes": activations,
            "workload": {"batch": workload.batch, "context": workload.context, **shared},
            **{f"{phase}_s": seconds for phase, seconds in took.items()},
        })  # fmt: skip
        return
    table = Table("what", "value", title=f"Best of job {front.job.id}: point {point.id}")
    rows = {
        "average bits": f"{point.average_bits:.4f}",
        "weights": f"{show_bytes(point.weight_bytes)} ({point.weight_bytes:,} bytes)",
        f"memory at {workload.batch} x {workload.context} tokens"
        + (f", each of {sharing.ranks} devices" if shared else ""): f"{show_bytes(memory)} "
        f"(KV cache {show_bytes(cache)}"
        + (f", activations {show_bytes(activations)})" if activations else ")"),
        "KL, nats per token": f"{point.kl:.5f} ({point.kl_low:.5f} to {point.kl_high:.5f})",
        "perplexity": f"{point.perplexity:.3f} (unquantized {front.reference_perplexity or 0:.3f})",
        **{f"{phase} latency": show_seconds(seconds) for phase, seconds in took.items()},
        **_request(front, took),
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

    try:
        rows, columns = (int(part) for part in shape.lower().split("x"))
        if rows < 1 or columns < 1:
            raise ValueError
    except ValueError:
        raise BitfrontError(f"'{shape}' is not a shape such as 4096x11008") from None
    chosen = [
        name
        for name in FORMATS
        if fnmatch(name, pattern)
        or pattern in (FORMATS[name].family, *FORMATS[name].family.split("+"))
    ]
    if not chosen:
        FORMATS[pattern]  # says so, with the nearest names
    entries = [_format_entry(FORMATS[name], (rows, columns)) for name in chosen]
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


def _format_entry(format: "Format", shape: tuple[int, int]) -> dict[str, Any]:
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
