"""Exports of a point: written beside their place, checked by reloading, then moved there."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bitfront.fronts import Front, Point, layout_of, losses, quality_key
from bitfront.model_card import vllm_says, write_card
from bitfront.sizes import show_bytes
from engines import Export, Target, load_target
from quantization.errors import ExportError
from quantization.precision_map import ModelEntry, PrecisionMap, build_map
from quantization.schemes import Scheme
from store.database import Store

CHECKED_CHUNKS = 4


def export_point(
    store: Store, front: Front, number: int, target_names: Sequence[str], folder: Path, force: bool
) -> list[dict[str, Any]]:
    """Write one point to one target or several; what was written and how each reload compared.

    Several targets get a folder each, called like them, inside the folder.

    Raises:
        ExportError: no such point, the folder is taken, the target doesn't serve the map, it can't
            be written, or the reload differs.
    """
    targets = [load_target(name.strip()) for name in dict.fromkeys(target_names)]
    point = front.point(number)
    if point is None:
        known = ", ".join(map(str, sorted(p.id for p in front.points))) or "none"
        raise ExportError(f"job {front.job.id} has no measured point {number}; there are: {known}")
    places = {t.name: folder / t.name if len(targets) > 1 else folder for t in targets}
    for place in places.values():
        _check_free(place, force)
    chosen = precision_map(front, point)
    export = (
        _with_model(store, front, point, chosen)
        if any(target.needs_model for target in targets)
        else Export(chosen)
    )
    for target in targets:
        target.refuse(export)
    return [_exported(front, point, target, export, places[target.name]) for target in targets]


def show(exports: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What `export` prints."""
    for written in exports:
        for name, size in written["files"].items():
            yield f"{Path(written['folder']) / name}  {show_bytes(size)}"
        if "weight_bytes" in written:
            yield (
                f"tensors: {written['weight_bytes']:,} bytes written, "
                f"{written['predicted_bytes']:,} counted by the search"
            )
        if "reloaded_kl" in written:
            yield (
                f"reloaded: KL {written['reloaded_kl']:.5f} nats per token on {written['chunks']} "
                f"held-out chunks, {written['measured_kl']:.5f} when it was measured"
            )
        if "top1_agreement" in written:
            yield (
                f"perplexity {written['reloaded_perplexity']:.4g} there, "
                f"{written['measured_perplexity']:.4g} here; the likeliest token is the same for "
                f"{written['top1_agreement']:.1%}; {written['prompt_tokens_per_s']:.0f} tokens of a "
                f"prompt a second, {written['generated_tokens_per_s']:.0f} generated"
            )
        yield from vllm_says(written)
        for name in written.get("not_in_vllm", ())[:1]:
            yield f"vLLM has no kernel for {len(written['not_in_vllm'])} units, such as {name}"
        for what in ("serve", "requantize"):
            if written.get(what):
                yield f"{what}: {written[what]}"


def _check_free(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"'{folder}' is a file; choose a folder")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise ExportError(f"'{folder}' is not empty; choose another folder, or add --force")


def _exported(
    front: Front, point: Point, target: Target, export: Export, folder: Path
) -> dict[str, Any]:
    def card(work: Path, found: dict[str, Any]) -> None:
        write_card(work, front, point, export.precision_map, target.name, found)

    found = _write_checked(target, export, folder, card)
    return {
        "job": front.job.id,
        "point": point.id,
        "target": target.name,
        "folder": str(folder),
        "files": {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()},
        "predicted_bytes": point.weight_bytes,
        **found,
    }


def _write_checked(
    target: Target,
    export: Export,
    folder: Path,
    card: Callable[[Path, dict[str, Any]], None],
) -> dict[str, Any]:
    """Write beside the folder, check, and move there: whole where nothing was, else file by file."""
    is_new = not folder.parent.exists()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as error:
        raise ExportError(f"can't write to '{folder.parent}' ({error})") from error
    try:
        target.write(export, work)
        found = target.check(export, work)
        card(work, found)
        work.chmod(0o755)
        for file in (p for p in work.iterdir() if p.is_file()):
            file.chmod(0o644)  # safetensors writes files that only their owner may read
        if not folder.exists() or not any(folder.iterdir()):
            work.replace(folder)
        else:
            _clear(folder, {file.name for file in work.iterdir()})
            for file in work.iterdir():
                os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"can't write the export to '{folder}' ({error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # somebody's files are in it
                folder.parent.rmdir()
    return found


def _clear(folder: Path, new: set[str]) -> None:
    """Take away weights of another layout, which loaders would prefer to the new ones."""
    for file in folder.iterdir():
        if file.name not in new and file.name.endswith((".safetensors", ".safetensors.index.json")):
            file.unlink()


def precision_map(front: Front, point: Point) -> PrecisionMap:
    """The neutral map of a measured point, with where it comes from; no model is needed."""
    job, model = front.job, front.model
    candidate = front.candidates[point.id]
    schemes = [Scheme.stored(name) for name in candidate.schemes]
    return build_map(
        layout_of(job, model),
        [(scheme.weight, scheme.activation) for scheme in schemes],
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


def _with_model(store: Store, front: Front, point: Point, chosen: PrecisionMap) -> Export:
    """Rebuild the candidate from the bank, and find the chunks that it was measured on."""
    from bitfront.pipeline import spec_of
    from bitfront.plan import admitting, plan_again
    from workers.session import Session

    plan = plan_again(front.job, front.model)
    plan = admitting(plan, chosen.schemes)  # a given map may go beyond the menu
    spec = replace(spec_of(plan, None), threads=os.cpu_count() or 1)
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
    return Export(chosen, session.evaluator, text.ids[:CHECKED_CHUNKS], measured.kl.mean)
