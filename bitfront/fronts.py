"""Fronts from the store: points with their intervals, what dominates what, and plain words.

No torch, no ray, no SciPy: `front`, `query` and `jobs` answer at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from math import exp, inf, isfinite
from typing import Any

import numpy as np

from bitfront import caching, latency
from bitfront.findings import additive, few_tokens
from cost_models.memory import PHASES, Sharing
from quantization.units import Layout
from search.front import non_dominated
from search.statistics import Interval, divergence_interval, paired_difference
from store.database import Store
from store.errors import NotFoundError
from store.queries import (
    QualityKey,
    Sums,
    candidates_of,
    find_model,
    measured_sums,
    reference_hash,
)
from store.tables import Candidate, Job, Model

SAME_SIZE = 0.001  # less than one unit's step between neighbouring schemes
COMPARABLE_SIZE = 0.01
INTERACTIONS, REFINED = "interactions", "refined"
"""What the origins of maps of later stages begin with."""

ALONE = Sharing()
"""One device, which holds everything."""
PRESET, GIVEN = "preset", "given"
NAMED = (PRESET, GIVEN)
"""Controls whose origin is a name."""


@dataclass(frozen=True)
class Point:
    """A measured candidate, in the pinned form of `bitfront front --json`.

    Args:
        cache_bytes: of the KV cache at the job's workload, where the job chose its formats.
    """

    id: int
    average_bits: float
    weight_bytes: int
    kl: float
    kl_low: float
    kl_high: float
    perplexity: float
    search_kl: float | None
    predicted_kl: float | None
    control: str | None
    on_front: bool
    map_hash: str
    cache_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; of a cache only where the job chose its formats."""
        found = asdict(self)
        if self.cache_bytes is None:
            del found["cache_bytes"]
        return found

    @property
    def size_bytes(self) -> int:
        """What the front is drawn by, and budgets count."""
        return self.weight_bytes + (self.cache_bytes or 0)


@dataclass(frozen=True)
class Front:
    """A job's measured points by rising bytes, and what else a report shows.

    Args:
        reference_perplexity: the unquantized model's on the held-out text.
        findings: sentences on how the front compares with its controls.
    """

    job: Job
    model: Model
    points: tuple[Point, ...]
    candidates: dict[int, Candidate]
    reference_perplexity: float | None
    findings: tuple[str, ...]

    @cached_property
    def layout(self) -> Layout:
        """The units that the job decided."""
        return layout_of(self.job, self.model)

    def to_json(self) -> dict[str, Any]:
        """The pinned document."""
        times = latency.document(self.job, self.points)
        return {
            "job": self.job.id,
            "model": self.model.name,
            "points": [point.to_json() for point in self.points],
            **({"times": times} if times else {}),
        }

    def point(self, number: int) -> Point | None:
        """The point with that id."""
        return next((point for point in self.points if point.id == number), None)


@dataclass(frozen=True)
class MapLoss:
    """A map's loss on all chunks of a text."""

    kl: Interval
    perplexity: float
    kl_sums: np.ndarray
    tokens: np.ndarray


def quality_key(job: Job) -> QualityKey:
    """What the measurements of a job are keyed by."""
    return QualityKey(job.model_hash, job.facts["quantizer"], job.facts["dtype"])


def layout_of(job: Job, model: Model) -> Layout:
    """The units that a job decided: the model's, split where its engine fuses nothing."""
    layout = Layout.from_json(model.layout)
    layout = layout.split() if job.facts.get("split") else layout
    return layout.with_caches(job.facts["caches"]) if "caches" in job.facts else layout


def losses(
    store: Store, quality: QualityKey, candidates: Sequence[Candidate], chunks: Sequence[str]
) -> dict[str, MapLoss]:
    """The loss of each candidate that was measured on all of the chunks, by map hash."""
    return _losses(store, quality, [c.map_hash for c in candidates], chunks)


def _losses(
    store: Store, quality: QualityKey, maps: Sequence[str], chunks: Sequence[str]
) -> dict[str, MapLoss]:
    keys = {found: [quality.of(found, chunk) for chunk in chunks] for found in maps}
    rows = measured_sums(store, [key for own in keys.values() for key in own])
    result = {}
    for found, wanted in keys.items():
        own = [rows[key] for key in wanted if key in rows]
        if own and len(own) == len(wanted):
            result[found] = _summary(own)
    return result


def _summary(rows: Sequence[Sums]) -> MapLoss:
    kl = np.array([row.kl_sum for row in rows])
    tokens = np.array([float(row.tokens) for row in rows])
    nll = sum(row.nll_sum for row in rows) / tokens.sum()
    return MapLoss(divergence_interval(kl, tokens), exp(min(nll, 700.0)), kl, tokens)


def load_front(store: Store, job: Job) -> Front:
    """The front of a job as far as it was measured.

    Raises:
        NotFoundError: it isn't planned yet, so that nothing can have been.
    """
    if "chunks" not in job.facts:  # they come right after its model
        raise NotFoundError(f"job {job.id} is {job.state} and not planned yet; wait for its driver")
    proposed = candidates_of(store, job.id)
    candidates = [c for c in proposed if c.finalist]
    quality, chunks = quality_key(job), job.facts["chunks"]
    heldout = losses(store, quality, candidates, chunks["heldout"])
    search = losses(store, quality, candidates, chunks["search"])
    measured = sorted(
        (c for c in candidates if c.map_hash in heldout), key=lambda c: (c.weight_bytes, c.point)
    )
    on_front = non_dominated(
        np.array([c.weight_bytes for c in measured]),
        np.array([heldout[c.map_hash].kl.mean for c in measured]),
    )
    model = find_model(store, job.model_hash)
    layout = layout_of(job, model) if caching.is_open(job) else Layout((), (), 0)
    held = {c.map_hash: caching.held_bytes(job, layout, c.schemes) for c in measured}
    points = tuple(
        _point(c, heldout[c.map_hash], search.get(c.map_hash), bool(is_on), held[c.map_hash])
        for c, is_on in zip(measured, on_front, strict=True)
    )
    reference = reference_hash(job.model_hash)
    unquantized = _losses(store, quality, [reference], chunks["heldout"]).get(reference)
    return Front(
        job,
        model,
        points,
        {c.point: c for c in measured},
        unquantized.perplexity if unquantized else None,
        (
            *_findings(points, heldout, {c.point: c for c in measured}),
            *(f"Point {c.point} ({c.origin}): {c.failure}." for c in proposed if c.failure),
            *_bought(points, heldout, candidates),
            *additive(job.facts.get("interactions")),
            *latency.remarks(job, points),
            *few_tokens(job.facts.get("experts", ())),
        ),
    )


def _point(
    c: Candidate, loss: MapLoss, search: MapLoss | None, on_front: bool, cache_bytes: int | None
) -> Point:
    return Point(
        id=c.point,
        average_bits=c.average_bits,
        weight_bytes=c.weight_bytes - (cache_bytes or 0),
        cache_bytes=cache_bytes,
        kl=loss.kl.mean,
        kl_low=loss.kl.low,
        kl_high=loss.kl.high,
        perplexity=loss.perplexity,
        search_kl=search.kl.mean if search else None,
        predicted_kl=c.predicted_kl,
        control=c.control,
        on_front=on_front,
        map_hash=c.map_hash,
    )


def _findings(
    points: Sequence[Point], heldout: dict[str, MapLoss], of: Mapping[int, Candidate]
) -> list[str]:
    """How the chosen maps compare with each control of the same bytes, in paired differences."""
    findings = []
    for control in (p for p in points if p.control):
        own = of[control.id].origin if control.control in NAMED else f"the {control.control} map"
        name = f"{own} of {control.average_bits:.3g} bits (point {control.id})"
        if of[control.id].certificate:
            findings.append(f"At its size, {name} is also the solver's choice.")
            continue
        largest = control.size_bytes * (1 + SAME_SIZE)
        rivals = [p for p in points if not p.control and p.size_bytes <= largest]
        best = min(rivals, key=lambda p: p.kl, default=None)
        if best is not None:
            findings.append(_compare(best, control, name, heldout))
    return findings


def is_later(candidate: Candidate) -> bool:
    """Whether it came of interactions or refinement, not of an estimator's table alone."""
    return candidate.origin.startswith((INTERACTIONS, REFINED))


def _bought(
    points: Sequence[Point], heldout: dict[str, MapLoss], candidates: Sequence[Candidate]
) -> list[str]:
    """What the maps of later stages gain over the best map of the tables at their size, in pairs."""
    of = {c.point: c for c in candidates}
    findings = []
    for point in (p for p in points if is_later(of[p.id])):
        near = [
            p
            for p in points
            if not (p.control or is_later(of[p.id]))
            and abs(p.size_bytes / point.size_bytes - 1) < COMPARABLE_SIZE
        ]
        if before := min(near, key=lambda p: p.kl, default=None):
            mine, theirs = heldout[point.map_hash], heldout[before.map_hash]
            gap = paired_difference(mine.kl_sums, theirs.kl_sums, mine.tokens)
            stage = of[point.id].origin.partition(",")[0]
            findings.append(
                f"Point {point.id} ({stage}): {point.kl / max(before.kl, 1e-12) - 1:+.1%} KL against "
                f"point {before.id}, the best without; 95 % interval of the difference "
                f"{gap.low:+.2g} to {gap.high:+.2g} nats per token."
            )
    return findings


def _compare(ours: Point, control: Point, name: str, heldout: dict[str, MapLoss]) -> str:
    mine, theirs = heldout[ours.map_hash], heldout[control.map_hash]
    gap = paired_difference(mine.kl_sums, theirs.kl_sums, mine.tokens)
    share = f"{ours.kl / control.kl - 1:+.0%} KL" if control.kl > 0 else f"{gap.mean:+.2g} nats"
    fewer = 1 - ours.size_bytes / control.size_bytes
    size = "the same bytes" if fewer < COMPARABLE_SIZE else f"{fewer:.0%} fewer bytes"
    if gap.high < 0:
        but = ""
        if ours.perplexity > control.perplexity:
            but = f", though its perplexity is higher ({ours.perplexity:.4g} against "
            but += f"{control.perplexity:.4g})"
        return f"Point {ours.id} loses less than {name}: {share} with {size}{but}."
    if fewer >= COMPARABLE_SIZE:
        return (
            f"No mix of about the size of {name} was measured here to compare with it: none was "
            "searched, or it lost on the search text."
        )
    if gap.low > 0:
        return (
            f"Point {ours.id} LOSES MORE than {name}: {share} with {size}. "
            "A mix is not worth it there; take the control."
        )
    return (
        f"Point {ours.id} and {name} can't be told apart on this text: {share} with {size}, "
        f"95 % interval of the difference {gap.low:+.2g} to {gap.high:+.2g} nats per token."
    )


@dataclass(frozen=True)
class Constraints:
    """Upper bounds for a query; memory includes the KV cache of the workload, and is a device's.

    `weight_bytes` are what budgets of that name count: the KV cache, too, where a job chose its formats.
    """

    weight_bytes: float = inf
    average_bits: float = inf
    kl: float = inf
    memory_bytes: float = inf
    decode_s: float = inf
    prefill_s: float = inf
    decode_j: float = inf
    prefill_j: float = inf


def best_point(
    front: Front, limits: Constraints, memory: Callable[[Point], int]
) -> tuple[Point | None, str | None]:
    """The point of least KL (then least bytes) within the limits, or why there is none.

    With a limit on the KL the question is turned round: the fewest bytes that stay within it.

    Args:
        front: whose points.
        limits: upper bounds.
        memory: what a point takes of a device's.
    """
    if not front.points:
        return None, f"job {front.job.id} has no measured points yet"
    known: list[tuple[str, float, Any]] = [
        ("weight_bytes", limits.weight_bytes, lambda p: p.size_bytes),
        ("average_bits", limits.average_bits, lambda p: p.average_bits),
        ("kl", limits.kl, lambda p: p.kl),
        (
            "memory_bytes",
            limits.memory_bytes,
            memory,
        ),
        *_spending_checks(front, limits),
    ]
    checks = [check for check in known if check[1] < inf]
    fitting = [p for p in front.points if all(value(p) <= limit for _, limit, value in checks)]
    if fitting:
        if limits.kl < inf:
            return min(fitting, key=lambda p: (p.size_bytes, p.kl)), None
        return min(fitting, key=lambda p: (p.kl, p.size_bytes)), None
    impossible = [
        f"{name} <= {_number(limit)} "
        + (f"(the smallest is {_number(least)})" if isfinite(least) else "(none is timed yet)")
        for name, limit, value in checks
        if (least := min(value(p) for p in front.points)) > limit
    ]
    if impossible:
        return None, "no measured point has " + " or ".join(impossible)
    return None, "no measured point meets these constraints together; relax one of them"


def _spending_checks(front: Front, limits: Constraints) -> list[tuple[str, float, Any]]:
    """Those that the query asks for; a point that nobody timed meets none."""
    return [
        (f"{phase}_{unit}", limit, partial(_taken, front.job, of, phase))
        for unit, of in (("s", latency.seconds), ("j", latency.joules))
        for phase in PHASES
        if (limit := getattr(limits, f"{phase}_{unit}")) < inf
    ]


def _taken(
    job: Job, of: Callable[[Job, str, str], float | None], phase: str, point: Point
) -> float:
    found = of(job, point.map_hash, phase)
    return inf if found is None else found


def _number(value: float) -> str:
    """Whole numbers with thousands apart, others to six digits."""
    return f"{value:,.0f}" if isfinite(value) and value == int(value) else f"{value:.6g}"
