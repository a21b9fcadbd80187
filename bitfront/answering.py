"""Answers to questions about measured maps: the best one under constraints, and two compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

from bitfront import caching, latency
from bitfront.fronts import (
    Constraints,
    Front,
    Point,
    best_point,
    losses,
    quality_key,
)
from cost_models.memory import PHASES, Phase, Sharing, Workload, kv_cache_bytes
from quantization.errors import BitfrontError
from search.statistics import paired_difference
from store.database import Store

LIMITS = (
    "weight_bytes", "average_bits", "kl", "memory_bytes", "decode_s", "prefill_s",
    "decode_j", "prefill_j",
)  # fmt: skip
Limits = Mapping[str, float | None]


class NothingFitsError(BitfrontError):
    """A question that no measured point answers."""


@dataclass(frozen=True)
class Footprint:
    """What a job's maps take at a workload.

    Args:
        front: the job's.
        workload: batch and context.
        activation_bytes: known for the job's own workload only, else 0.
        sharing: what of it one of several devices holds.
    """

    front: Front
    workload: Workload
    activation_bytes: int
    sharing: Sharing

    def cache_bytes(self, point: Point) -> int:
        """Of the KV cache, on each device."""
        if not caching.is_open(self.front.job):
            return self._one_for_all
        schemes = self.front.candidates[point.id].schemes
        whole = caching.bytes_at(self.front.job, self.front.layout, schemes, self.workload)
        return self.sharing.cache(whole)

    @cached_property
    def _one_for_all(self) -> int:
        """The cache of every map, where the job left it as it is."""
        return self.sharing.cache(kv_cache_bytes(self.front.layout, self.workload))

    def memory_bytes(self, point: Point) -> int:
        """Of each device."""
        weights = self.sharing.weights(point.weight_bytes)
        return weights + self.cache_bytes(point) + self.activation_bytes


def footprint(front: Front, batch: int | None = None, context: int | None = None) -> Footprint:
    """At a workload; by default at the job's, whose activations are known and counted."""
    known = front.job.facts.get("memory", {"workload": {}, "activation_bytes": 0})
    given = {k: v for k, v in {"batch": batch, "context": context}.items() if v is not None}
    workload = Workload(**{**known["workload"], **given})
    sharing = Sharing(**known.get("sharing", {}))
    return Footprint(front, workload, 0 if given else known["activation_bytes"], sharing)


@dataclass(frozen=True)
class Answer:
    """The best point of a front, and what it takes there."""

    front: Front
    point: Point
    batch: int | None
    context: int | None
    seconds: dict[Phase, float]
    joules: dict[Phase, float]

    @cached_property
    def footprint(self) -> Footprint:
        """At the workload of the question: of the best of many answers only."""
        return footprint(self.front, self.batch, self.context)

    @property
    def memory_bytes(self) -> int:
        """Weights, KV cache and activations."""
        return self.footprint.memory_bytes(self.point)

    def to_json(self) -> dict[str, Any]:
        """As `bitfront query --json` prints it."""
        found, workload = self.footprint, self.footprint.workload
        ranks = found.sharing.ranks
        shared = {} if ranks == 1 else {"tensor_parallel": ranks}
        return {
            "job": self.front.job.id,
            "model": self.front.model.name,
            "point": self.point.to_json(),
            "memory_bytes": self.memory_bytes,
            "kv_cache_bytes": found.cache_bytes(self.point),
            "activation_bytes": found.activation_bytes,
            "workload": {"batch": workload.batch, "context": workload.context, **shared},
            **{f"{phase}_s": seconds for phase, seconds in self.seconds.items()},
            **{f"{phase}_j": joules for phase, joules in self.joules.items()},
        }


def _check_energy(front: Front, limits: Limits) -> None:
    """Raise where joules are limited, and no point's are known."""
    job = front.job
    for phase in PHASES:
        if limits.get(f"{phase}_j") is None:
            continue
        if all(latency.joules(job, point.map_hash, phase) is None for point in front.points):
            facts = (job.facts.get("times") or {}).get("joules") or {}
            why = f" ({facts['unknown']})" if facts.get("unknown") else ""
            raise NothingFitsError(
                f"job {job.id} knows no energy{why}: search with --max-{phase}-energy where a counter "
                "can be read, or on a device of the catalogue, then ask again"
            )


def answer(
    front: Front, limits: Limits, batch: int | None = None, context: int | None = None
) -> Answer:
    """The best point of a front within limits (names of `LIMITS`; None is none).

    Raises:
        NothingFitsError: with what each limit would have to be at least.
    """
    job = front.job
    if (limits.get("decode_s") or limits.get("prefill_s")) and not job.facts.get("times"):
        raise NothingFitsError(
            f"job {job.id} has no latency: search with --engine llama.cpp, then ask again"
        )
    _check_energy(front, limits)
    if limits.get("memory_bytes") is not None and not front.layout.cache:
        raise NothingFitsError(
            "this model's KV cache is unknown (its forward pass could not be traced), so its "
            "memory is, too; constrain --max-size instead"
        )
    found = None
    if limits.get("memory_bytes") is not None:
        found = footprint(front, batch, context)
    bounds = {n: inf if limits.get(n) is None else float(limits[n] or 0) for n in LIMITS}
    point, why_not = best_point(
        front,
        Constraints(**bounds),
        found.memory_bytes if found else lambda point: point.size_bytes,
    )
    if point is None:
        raise NothingFitsError(str(why_not))
    took, spent = (
        {phase: known for phase in PHASES if (known := of(job, point.map_hash, phase)) is not None}
        for of in (latency.seconds, latency.joules)
    )
    return Answer(front, point, batch, context, took, spent)


def best_answer(answers: Sequence[Answer], by_size: bool) -> tuple[Answer, list[Answer]]:
    """The best of several jobs' answers, and the best of each other model and held-out text.

    KL is only comparable of the same model on the same text. What most answers are of decides.

    Args:
        answers: one at least.
        by_size: the KL is limited, and the fewest bytes are wanted.
    """
    groups: dict[tuple[str, ...], list[Answer]] = {}
    for found in answers:
        job = found.front.job
        groups.setdefault((job.model_hash, *job.facts["chunks"]["heldout"]), []).append(found)

    def rank(found: Answer) -> tuple[float, float]:
        sizes = float(found.point.size_bytes), found.point.kl
        return sizes if by_size else sizes[::-1]

    ordered = sorted(groups.values(), key=lambda group: (-len(group), -group[0].front.job.id))
    first, *others = (min(group, key=rank) for group in ordered)
    return first, others


def compare(store: Store, a: tuple[Front, int], b: tuple[Front, int]) -> dict[str, Any]:
    """Two measured points, chunk by chunk: KL of the first less that of the second.

    Raises:
        BitfrontError: no such point, or points that were measured on different text or models.
    """
    (front_a, point_a), (front_b, point_b) = (_point(*pair) for pair in (a, b))
    if front_a.job.model_hash != front_b.job.model_hash:
        raise BitfrontError(
            f"job {front_a.job.id} is of {front_a.model.name} and job {front_b.job.id} of "
            f"{front_b.model.name}: maps of different models can't be compared in pairs"
        )
    found = []
    for front, point in ((front_a, point_a), (front_b, point_b)):
        chunks = front.job.facts["chunks"]["heldout"]
        own = front.candidates[point.id]
        found.append((chunks, losses(store, quality_key(front.job), [own], chunks)[own.map_hash]))
    (chunks, mine), (others, theirs) = found
    if chunks != others:
        raise BitfrontError(
            f"jobs {front_a.job.id} and {front_b.job.id} were measured on different held-out text; "
            "search both with the same --text to compare them"
        )
    gap = paired_difference(mine.kl_sums, theirs.kl_sums, mine.tokens)
    names = [f"point {p.id} of job {f.job.id}" for f, p in ((front_a, point_a), (front_b, point_b))]
    if gap.high < 0 or gap.low > 0:
        better, worse = names if gap.high < 0 else names[::-1]
        verdict = f"{better} loses less than {worse}"
    else:
        verdict = f"{names[0]} and {names[1]} can't be told apart on this text"
    units = [unit.name for unit in front_a.layout.units]
    schemes = [f.candidates[p.id].schemes for f, p in ((front_a, point_a), (front_b, point_b))]
    differing = []
    if len(schemes[0]) == len(schemes[1]):  # an engine that fuses nothing splits units
        differing = [
            {"unit": unit, "a": x, "b": y}
            for unit, x, y in zip(units, *schemes, strict=True)
            if x != y
        ]
    return {
        "a": {"job": front_a.job.id, "point": point_a.id},
        "b": {"job": front_b.job.id, "point": point_b.id},
        "chunks": len(chunks),
        "difference": {"mean": gap.mean, "low": gap.low, "high": gap.high},
        "verdict": verdict,
        "differing": differing,
        "same": len(units) - len(differing) if len(schemes[0]) == len(schemes[1]) else None,
    }


def _point(front: Front, number: int) -> tuple[Front, Point]:
    point = front.point(number)
    if point is None:
        known = ", ".join(str(p.id) for p in front.points) or "none"
        raise BitfrontError(f"job {front.job.id} has no measured point {number}; there are {known}")
    return front, point
