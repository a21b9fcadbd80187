"""What a job's record says of its maps' seconds: predicted, measured, and how far these differ."""

from collections.abc import Sequence
from typing import Any

from bitfront.sizes import show_joules, show_seconds
from cost_models.memory import PHASES
from store.tables import Job

WORDS = {"prefill": "prompt processing", "decode": "a generated token"}


def seconds(job: Job, map_hash: str, phase: str) -> float | None:
    """What a map takes: measured where it was run, else predicted; None if nobody asked."""
    found = _maps(job).get(map_hash)
    if found is None:
        return None
    value: float = found.get("measured", found["predicted"])[phase]
    return value


def joules(job: Job, map_hash: str, phase: str) -> float | None:
    """What a map costs: as a counter watched it run, else predicted; None if nobody knows."""
    known = _maps(job).get(map_hash, {})
    watched: float | None = known.get("joules", {}).get(phase)
    return known.get("predicted_joules", {}).get(phase) if watched is None else watched


def document(job: Job, points: Sequence[Any]) -> dict[str, Any] | None:
    """The times of a front's points, for `--json`; None where the job has none."""
    facts = job.facts.get("times")
    if not facts:
        return None
    maps = _maps(job)
    rest = {name: value for name, value in facts.items() if name != "maps"}
    return {**rest, "points": {p.id: maps[p.map_hash] for p in points if p.map_hash in maps}}


def remarks(job: Job, points: Sequence[Any]) -> list[str]:
    """Where times come from, how well they were predicted, and limits that can't be told to hold."""
    facts = job.facts.get("times")
    if not facts:
        return []
    return [
        _source(facts), *_checked(job), *_binding(job, points), *_uncontrolled(job, points),
        *_energy(job, points), *_cells(facts),
    ]  # fmt: skip


def _maps(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = job.facts.get("times", {}).get("maps", {})
    return found


def _source(facts: dict[str, Any]) -> str:
    load = facts["workload"]
    work = f"a prompt of {load['prompt']} tokens, {load['context']} in the cache, batch {load['batch']}"
    if facts["source"] == "analytical":
        return f"Latency is analytical (a roofline of {facts['device']}, {work}): nothing was run there."
    return (
        f"Latency with {facts['engine']} ({facts['threads']} threads) on {facts['device']}: {work}; "
        f"{show_seconds(max(facts['overhead_s']['decode'], 0))} of a token is beside the weights."
    )


def _checked(job: Job) -> list[str]:
    """Predicted against measured over the maps that were run, but for those that the fit has seen."""
    runs = [found for found in _maps(job).values() if "measured" in found and not found["fitted"]]
    if not runs:
        return []
    parts = []
    for phase in PHASES:
        off = [abs(r["predicted"][phase] / r["measured"][phase] - 1) for r in runs]
        parts.append(f"{WORDS[phase]} by {sum(off) / len(off):.1%} (at most {max(off):.1%})")
    return [
        f"Predicted latency of {len(runs)} maps was off from what they took: {', '.join(parts)}."
    ]


def _binding(job: Job, points: Sequence[Any]) -> list[str]:
    """Points whose limit holds or breaks within the model's error."""
    found = []
    serving, errors = job.config.get("serving", {}), job.facts["times"]["errors"]
    for phase in PHASES:
        limit, error = serving.get(f"max_{phase}_s"), errors.get(phase)
        if limit is None:
            continue
        for point in points:
            took = seconds(job, point.map_hash, phase)
            if took is None:
                continue
            if took > limit:
                found.append(
                    f"Point {point.id} takes {show_seconds(took)} for {WORDS[phase]}, MORE than the "
                    f"{show_seconds(limit)} allowed: the prediction was too low."
                )
            elif error and took * (1 + error) > limit:
                found.append(
                    f"Point {point.id} is within the model's error ({error:.1%}) of the "
                    f"{show_seconds(limit)} allowed for {WORDS[phase]}."
                )
    return found


def _energy(job: Job, points: Sequence[Any]) -> list[str]:
    """Where joules come from, and points that take more than was allowed."""
    source = (job.facts["times"].get("joules") or {}).get("source")
    limits = {p: job.config.get("serving", {}).get(f"max_{p}_j") for p in PHASES}
    found = [f"Energy: {source}."] if source else []
    for phase, most in limits.items():
        for point in points if most is not None else ():
            spent = joules(job, point.map_hash, phase)
            if spent is not None and spent > most * (1 + 1e-6):
                found.append(
                    f"Point {point.id} takes {show_joules(spent)} for {WORDS[phase]}, MORE than the "
                    f"{show_joules(most)} allowed: the prediction was too low."
                )
    return found


def _uncontrolled(job: Job, points: Sequence[Any]) -> list[str]:
    """Controls are left out where limits forbid them, since they could end up as the answer."""
    serving = job.config.get("serving", {})
    limited = any(serving.get(f"max_{phase}_{unit}") for phase in PHASES for unit in "sj")
    if not limited or any(point.control for point in points):
        return []
    return [
        "No uniform or random map keeps the limits on latency and energy: there is no control to compare with."
    ]


def _cells(facts: dict[str, Any]) -> list[str]:
    found = [f"Not timed, and left out: {cell}." for cell in facts["failed_cells"]]
    if facts["noisy_cells"]:
        found.append(
            f"Products that could not be timed well, since their repeats differ by more than 15 %: "
            f"{facts['noisy_cells']}. Close what else runs on this machine, then profile again."
        )
    return found
