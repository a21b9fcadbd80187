"""Exports of a point: written beside their place, checked by reloading, then moved there."""

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bitfront.fronts import Front, Point, layout_of, losses, quality_key
from engines import Export, Target, load_target
from quantization.errors import ExportError
from quantization.precision_map import ModelEntry, PrecisionMap, build_map
from store.database import Store

CHECKED_CHUNKS = 4


def export_point(
    store: Store, front: Front, number: int, target_name: str, folder: Path, force: bool
) -> dict[str, Any]:
    """Write one point to one target; what was written and how the reload compared.

    Raises:
        ExportError: no such point, the folder is taken, it can't be written, or the reload differs.
    """
    target = load_target(target_name)
    point = front.point(number)
    if point is None:
        known = ", ".join(map(str, sorted(p.id for p in front.points))) or "none"
        raise ExportError(f"job {front.job.id} has no measured point {number}; there are: {known}")
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"'{folder}' is a file; choose a folder")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise ExportError(f"'{folder}' is not empty; choose another folder, or add --force")
    precision_map = _precision_map(front, point)
    export = (
        _with_model(store, front, point, precision_map)
        if target.needs_model
        else Export(precision_map)
    )
    found = _write_checked(target, export, folder)
    return {
        "job": front.job.id,
        "point": point.id,
        "target": target.name,
        "folder": str(folder),
        "files": {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()},
        **found,
    }


def _write_checked(target: Target, export: Export, folder: Path) -> dict[str, Any]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as error:
        raise ExportError(f"can't write to '{folder.parent}' ({error})") from error
    try:
        target.write(export, work)
        found = target.check(export, work)
        work.chmod(0o755)
        folder.mkdir(exist_ok=True)
        for file in work.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner may read
            os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"can't write the export to '{folder}' ({error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found


def _precision_map(front: Front, point: Point) -> PrecisionMap:
    job, model = front.job, front.model
    candidate = front.candidates[point.id]
    schemes = [_formats(name) for name in candidate.schemes]
    return build_map(
        layout_of(job, model),
        schemes,
        ModelEntry(name=model.name, weights_hash=model.weights_hash, revision=model.revision),
        {
            "job": job.id,
            "point": point.id,
            "origin": candidate.origin,
            "quantizer": job.facts["quantizer"],
            "transform": job.facts.get("transform"),
            "average_bits": point.average_bits,
            "weight_bytes": point.weight_bytes,
            "kl": point.kl,
            "kl_low": point.kl_low,
            "kl_high": point.kl_high,
            "perplexity": point.perplexity,
            "arithmetic": job.facts["dtype"],
            "texts": {role: job.config["texts"][role] for role in job.facts["chunks"]},
            "certificate": candidate.certificate,
        },
    )


def _formats(scheme: str) -> tuple[str, str]:
    weight, _, activation = scheme.partition("/")
    return weight, activation or "bf16"


def _with_model(store: Store, front: Front, point: Point, precision_map: PrecisionMap) -> Export:
    """Rebuild the candidate from the bank, and find the chunks that it was measured on."""
    from bitfront.pipeline import spec_of
    from bitfront.plan import plan_again
    from workers.session import Session

    plan = plan_again(front.job, front.model)
    spec = replace(spec_of(plan, None), threads=os.cpu_count() or 1, packed=False)
    session = Session(spec)
    text = plan.texts["heldout"]
    chunks = text.hashes[:CHECKED_CHUNKS]
    candidate = front.candidates[point.id]
    measured = losses(store, quality_key(front.job), [candidate], chunks).get(point.map_hash)
    if measured is None:
        raise ExportError(
            f"the held-out text of job {front.job.id} has changed since it was measured; "
            "search again"
        )
    return Export(precision_map, session.evaluator, text.ids[:CHECKED_CHUNKS], measured.kl.mean)
