"""What the API says of jobs, fronts, units and exports, as JSON."""

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from bitfront import caching, latency
from bitfront.answering import Footprint, footprint
from bitfront.front_view import FrontView
from bitfront.fronts import Front, Point
from quantization.units import Layout, Unit
from store.tables import Event, ExportOrder, Job

LIMITS = {
    "max_memory_bytes": "memory_bytes", "max_decode_s": "decode_s", "max_prefill_s": "prefill_s",
    "max_decode_j": "decode_j", "max_prefill_j": "prefill_j",
}  # fmt: skip


def when(time: datetime) -> str:
    """A time as ISO 8601 in UTC; SQLite forgets the zone."""
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC).isoformat()


def job_document(job: Job, model: str, *, alive: bool, points: int | None) -> dict[str, Any]:
    """A job in a list."""
    serving = job.config.get("serving") or {}
    return {
        "id": job.id,
        "model": model,
        "state": job.state,
        "alive": alive,
        "error": job.error,
        "created_at": when(job.created_at),
        "updated_at": when(job.updated_at),
        "engine": serving.get("engine"),
        "device": serving.get("device") if serving.get("engine") else None,
        "submitted_by": job.submitted_by,
        "points": points,
        "progress": job.progress,
    }


def front_document(front: Front) -> FrontView:
    """A front with everything that its figure shows."""
    job = front.job
    serving = job.config.get("serving") or {}
    times = job.facts.get("times")
    taken = footprint(front) if front.layout.cache else None
    return FrontView({
        "job": job.id,
        "model": front.model.name,
        "state": job.state,
        "points": [point_document(front, point, taken) for point in front.points],
        "reference_perplexity": front.reference_perplexity,
        "noise_floor": job.facts.get("noise_floor"),
        "dtype": job.facts.get("dtype"),
        "transform": job.facts.get("transform"),
        "findings": list(front.findings),
        "method": method_of(front),
        "budgets": job.facts.get("budgets", []),
        "workload": times["workload"] if times else (job.facts.get("memory") or {}).get("workload"),
        "engine": serving.get("engine"),
        "device": serving.get("device") if serving.get("engine") else None,
        "limits": {ours: serving[name] for name, ours in LIMITS.items() if serving.get(name)},
        "weights_hash": job.weights_hash,
    })  # fmt: skip


def point_document(front: Front, point: Point, taken: Footprint | None) -> dict[str, Any]:
    """A measured map: `bitfront front --json`'s point, with its origin and costs."""
    job, candidate = front.job, front.candidates[point.id]
    known = (job.facts.get("times") or {}).get("maps", {}).get(point.map_hash, {})
    predicted, watched = known.get("predicted") or {}, known.get("joules") or {}
    foreseen = known.get("predicted_joules") or {}
    return {
        **point.to_json(),
        "origin": candidate.origin,
        "schemes": dict(Counter(candidate.schemes).most_common()),
        "size_bytes": point.size_bytes,
        "memory_bytes": taken.memory_bytes(point) if taken else None,
        "decode_s": latency.seconds(job, point.map_hash, "decode"),
        "prefill_s": latency.seconds(job, point.map_hash, "prefill"),
        "times": next((kind for kind in ("measured", "predicted") if kind in known), None),
        "predicted_decode_s": predicted.get("decode"),
        "predicted_prefill_s": predicted.get("prefill"),
        "decode_j": latency.joules(job, point.map_hash, "decode"),
        "prefill_j": latency.joules(job, point.map_hash, "prefill"),
        "energy": "measured" if watched.get("decode") else "predicted" if foreseen else None,
        "predicted_decode_j": foreseen.get("decode"),
        "predicted_prefill_j": foreseen.get("prefill"),
    }


def detail_document(front: Front, tables: dict[str, Any] | None) -> dict[str, Any]:
    """Units with the bits of each scheme, what each point chose, predicted losses, and seconds."""
    job, facts = front.job, front.job.facts
    layout, menu = front.layout, facts["menu"]
    units = [
        {
            "name": unit.name, "kind": unit.kind, "layer": unit.layer, "row": row_of(unit),
            "weights": unit.numel, "open": len(names) > 1,
        }
        for unit, names in zip(layout.units, facts["choices"], strict=True)
    ]  # fmt: skip
    bits = [
        [8 * cost / held if name in names else None for name, cost in zip(menu, costs, strict=True)]
        for held, names, costs in zip(
            caching.numbers(job, layout), facts["choices"], facts["bytes_table"], strict=True
        )
    ]
    columns = {name: index for index, name in enumerate(menu)}
    maps, beyond = {}, []
    for point in front.points:
        schemes = front.candidates[point.id].schemes
        for name in schemes:  # a map that was given may go beyond the menu
            if name not in columns:
                columns[name] = len(columns)
                beyond.append(name)
        maps[str(point.id)] = [columns[name] for name in schemes]
    for row in bits:
        row.extend([None] * len(beyond))
    return {
        "job": job.id,
        "units": units,
        "rows": rows_of(layout),
        "layers": 1 + max((unit.layer or 0) for unit in layout.units),
        "menu": [*menu, *beyond],
        "bits": bits,
        "maps": maps,
        "sensitivity": tables
        and {
            "estimator": tables["estimator"],
            "unit": "nats per token",
            "values": [[*row, *[None] * len(beyond)] for row in tables["loss"]],
        },
        "seconds": [
            {"stage": stage, **took} for stage, took in facts.get("stages", {}).items()
        ],
    }  # fmt: skip


def export_document(order: ExportOrder) -> dict[str, Any]:
    """An export that somebody ordered."""
    return {
        "id": order.id,
        "job": order.job_id,
        "point": order.point,
        "targets": order.targets,
        "state": order.state,
        "error": order.error,
        "created_at": when(order.created_at),
        "submitted_by": order.submitted_by,
        "files": order.files,
        "result": order.result,
    }


def event_document(event: Event) -> dict[str, Any]:
    """Something that happened in a job."""
    return {"id": event.id, "event": event.kind, "at": when(event.at), **event.data}


def log_line(event: Mapping[str, Any]) -> str:
    """An event as a line of the job's log."""
    at = event["at"][:19] + "Z"
    if event["event"] == "log":
        return f"{at}  {event['level']:<5}  {event['text']}"
    if event["event"] == "stage":
        took = f"{event['seconds']:.1f} s" if event["seconds"] is not None else "begins"
        return f"{at}  stage  {event['label']} ({event['steps']} steps): {took}"
    if event["event"] == "point":
        return f"{at}  point  {event['points']} points are measured"
    who = f" (by {event['by']})" if event.get("by") else ""
    said = f": {event['error']}" if event.get("error") else ""
    return f"{at}  state  {event.get('state')}{who}{said}"


def rows_of(layout: Layout) -> list[str]:
    """Kinds of unit in the order of a block, such as `self_attn.o_proj`."""
    return list(dict.fromkeys(row for unit in layout.units if (row := row_of(unit)) is not None))


def row_of(unit: Unit) -> str | None:
    """A unit's name without what depends on the layer; None outside of layers."""
    return None if unit.layer is None else unit.name.partition(f".{unit.layer}.")[2]


def method_of(front: Front) -> str:
    """In a few sentences, how the figures of a front were made."""
    facts, texts = front.job.facts, front.job.config["texts"]
    held = texts["heldout"]
    fit = facts.get("calibration", {}).get(facts.get("predicts", ""), {})
    words = (
        f"KL and perplexity on {held['chunks']} chunks of {held['length']} tokens of "
        f"{held['source']}, which neither calibration nor search has seen; intervals are "
        f"Student's t over chunks. Quantizer {facts['quantizer']}, arithmetic {facts['dtype']}."
    )
    if transform := facts.get("transform"):
        words += f" Channels rescaled by {transform} before quantization, which changes no output but for rounding."
    if fit:
        words += (
            f" Predictions: {facts['predicts']}, gain {fit['gain']:.3g} fitted on {fit['maps']} "
            f"maps of the search text, residual {fit['residual']:.2g} (log)."
        )
    if because := facts.get("estimators_because"):
        words += f" Estimators, {because}."
    return words
