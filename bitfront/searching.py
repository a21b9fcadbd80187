"""What `search` and `audit` do: plan, run or resume, print the front or the verdicts."""

import os
import time
from dataclasses import replace
from functools import partial
from typing import Any

from rich.table import Table

from bitfront.audit_views import audit_json, audit_remarks, audit_table
from bitfront.auditing import AuditOptions, run_audit
from bitfront.config import AUTO, UNPROVEN, ConfigError, JobConfig
from bitfront.console import errors, front_table, print_json, print_table
from bitfront.documents import front_document
from bitfront.fronts import load_front
from bitfront.pipeline import run_search
from bitfront.plan import Plan, make_plan, plan_again
from bitfront.progress import Lines, RichProgress
from bitfront.serving import limits_j, limits_s
from bitfront.settling import scoring_online, settled
from bitfront.sizes import show_bytes, show_joules, show_seconds
from bitfront.uniforms import uniform_maps
from cost_models.devices import LOCAL
from store.database import Store
from store.queries import find_job, find_model
from workers.pool import InProcessPool, Pool
from workers.session import SessionSpec

NO_RAY = "none"
READING = "reading the model (a GGUF file is imported once, in half a minute)"


def run(config: JobConfig, store: Store, address: str, workers: int | None, as_json: bool) -> None:
    """Run a job to its end and print its front."""
    start = time.monotonic()
    with errors.status(READING):
        plan = make_plan(config)
    errors.print(_summary(plan), highlight=False)
    plan = settled(plan, store)
    if plan.because:
        errors.print(f"Sensitivity, {plan.because}.", highlight=False)
    with (RichProgress if errors.is_terminal else Lines)(errors) as progress:
        opener = partial(open_pool, address=address, workers=workers)
        job_id = run_search(plan, store, opener, progress, os.environ.get("BITFRONT_CACHE"))
    front = load_front(store, find_job(store, job_id))
    if as_json:
        print_json(front.to_json())
    else:
        print_table(front_table(front_document(front)))
    for finding in front.findings:
        errors.print(finding, highlight=False)
    errors.print(
        f"Took {time.monotonic() - start:.0f} s. Look at it: bitfront front {job_id} --html "
        f"front.html   Take a map: bitfront export {job_id} --point N --to map -o DIR",
        highlight=False,
    )


def audit(
    store: Store,
    job_id: int | None,
    options: AuditOptions,
    address: str,
    workers: int | None,
    as_json: bool,
) -> None:
    """Audit the estimators on a job, print how well they predict."""
    job = find_job(store, job_id)
    with errors.status(READING):
        plan = plan_again(job, find_model(store, job.model_hash))
        if plan.key != job.key:
            raise ConfigError(
                f"the texts of job {job.id} have changed since; search again, then audit that job"
            )
    with (RichProgress if errors.is_terminal else Lines)(errors) as progress:
        opener = partial(open_pool, address=address, workers=workers)
        cache = os.environ.get("BITFRONT_CACHE")
        job = run_audit(plan, store, opener, progress, options, cache)
    found = job.facts["audit"]
    if as_json:
        print_json(audit_json(found))
    else:
        print_table(audit_table(job.id, found))
    for line in audit_remarks(found):
        errors.print(line, highlight=False)


def open_pool(spec: SessionSpec, address: str, workers: int | None) -> Pool:
    """The workers that the command line names."""
    if address == NO_RAY:
        return InProcessPool(replace(spec, threads=os.cpu_count() or 1))
    from workers.ray_pool import Needs, RayPool

    return RayPool(spec, address, Needs(workers))


def dry_run(config: JobConfig, as_json: bool) -> None:
    """Print what a job would do: units, menu, sizes and the number of measurements."""
    plan = make_plan(config)
    if plan.online:
        plan = scoring_online(plan)  # refuses what can't be scored
    document = _document(plan)
    if as_json:
        print_json(document)
        return
    units = Table("unit", "kind", "weights", "schemes", title=plan.name)
    for unit, row in zip(plan.layout.units, plan.choices, strict=True):
        numbers = f"{unit.numel:,}" if unit.numel else ""
        units.add_row(unit.name, unit.kind, numbers, ", ".join(s.name for s in row))
    for kept in plan.layout.kept:
        units.add_row(kept.name, "kept", f"{kept.numel:,}", f"full precision: {kept.reason}")
    print_table(units)
    caches = f" and KV cache at {config.serving.batch} x {config.serving.context} tokens"
    whose = f"weights{caches if plan.caches.any() else ''}"
    sizes = Table("uniform map", "average bits", whose)
    for entry in document["uniform"]:
        sizes.add_row(
            entry["scheme"], f"{entry['average_bits']:.4f}", show_bytes(entry["weight_bytes"])
        )
    print_table(sizes)
    errors.print(_summary(plan), highlight=False)
    if served := _served(plan):
        errors.print(served, highlight=False)
    counts = document["measurements"]
    more = f", {counts['refinement']} to refine" if counts["refinement"] else ""
    errors.print(
        f"At most {counts['search']} measurements on the search text{more} and "
        f"{counts['heldout']} on held-out text, a chunk each.",
        highlight=False,
    )


def _served(plan: Plan) -> str:
    """Where maps are to be served and what they may take there; times are learned by the search."""
    serving = plan.config.serving
    if serving.silent is True:
        return ""
    where = "this machine" if serving.device == LOCAL else serving.device
    shown = {
        "memory": serving.max_memory_bytes and show_bytes(serving.max_memory_bytes),
        **{f"{p} latency": show_seconds(most) for p, most in limits_s(serving).items()},
        **{f"{p} energy": show_joules(most) for p, most in limits_j(serving).items()},
    }
    limits = ", ".join(f"{name} {most}" for name, most in shown.items() if most)
    return (
        f"To be served by {serving.engine or 'no engine in particular'} on {where}: "
        f"{serving.batch} x {serving.context} tokens in the cache, prompts of {serving.prompt}. "
        f"Limits: {limits or 'none but the budgets'}; whether maps keep them the search finds out."
    )


def _summary(plan: Plan) -> str:
    kept = f", {len(plan.layout.kept)} layers kept in full precision" if plan.layout.kept else ""
    text = (
        f"{plan.name}: {int(plan.open_units.sum())} units to decide{kept}; "
        f"arithmetic {plan.dtype} ({plan.dtype_reason})"
    )
    if plan.folding:
        text += f"; channels rescaled by {plan.folding.identity}"
    for source, count in plan.placeholders.items():
        text += (
            f"\n  {count:,} <unk> of '{source}' were left out: they stand for words that its corpus "
            "has lost"
        )
    for layer in plan.layout.kept[:5]:
        text += f"\n  kept: {layer.name} ({layer.reason})"
    if len(plan.layout.kept) > 5:
        text += f"\n  … and {len(plan.layout.kept) - 5} more: see --dry-run"
    return text


def _document(plan: Plan) -> dict[str, Any]:
    problem = plan.problem(plan.bytes_table.astype(float))
    uniforms = [
        {
            "scheme": name,
            "average_bits": plan.average_bits(choice),
            "weight_bytes": plan.weight_bytes(choice),
        }
        for name, choice in uniform_maps(plan, problem).items()
    ]
    texts = plan.config.texts
    controls = len(uniforms) + plan.config.random_controls
    estimators = UNPROVEN if AUTO in plan.config.estimators else plan.config.estimators
    refinement, budgets = plan.config.refinement.measurements, len(plan.budgets)
    # a later stage may find a map for each budget, and the one it replaces is measured beside it
    later = budgets * (bool(refinement) + bool(plan.config.interactions))
    proposals = budgets * len(estimators)
    return {
        "model": plan.name,
        "units": [
            {
                "name": unit.name,
                "kind": unit.kind,
                "sites": [site.name for site in unit.sites],
                "weights": unit.numel,
                "schemes": [scheme.name for scheme in row],
            }
            for unit, row in zip(plan.layout.units, plan.choices, strict=True)
        ],
        "kept": [vars(kept) for kept in plan.layout.kept],
        "other_bytes": plan.other_bytes,
        "menu": [scheme.name for scheme in plan.menu],
        "uniform": uniforms,
        "budgets": list(plan.budgets),
        "serving": plan.config.serving.model_dump(),
        "placeholders": plan.placeholders,
        "measurements": {
            "search": (controls + proposals + later) * texts.search.chunks,
            "refinement": refinement,
            "heldout": (controls + (2 if later else 1) * budgets + 1) * texts.heldout.chunks,
        },
        "arithmetic": plan.dtype,
        "transform": plan.folding.identity if plan.folding else None,
    }
