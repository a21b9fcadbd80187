"""The audit: how well each estimator predicts, on a job's own model, menu and texts.

Maps are drawn at random (single flips, mixes of many sizes, mixes of equal size) and measured on
the job's search text; every estimator's sums are compared with what was measured. All of it goes
through the store like a search: a killed audit goes on, and a second one measures only what is new.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.config import ConfigError
from bitfront.fronts import losses
from bitfront.interacting import measured_pairs
from bitfront.measuring import OpenPool, measure, measure_reference, sharing
from bitfront.pipeline import open_planned, spec_of
from bitfront.plan import Plan
from bitfront.preparing import BANK, BANK_WEIGHT, prepare
from bitfront.progress import Progress
from bitfront.run import Run
from bitfront.scoring import ESTIMATE_WEIGHT, Scores, experts_seen, forecast_bytes, score
from bitfront.uniforms import uniform_maps
from cost_models import weight_bytes
from evaluation.arithmetic import memory_bytes
from quantization.errors import MeasurementError
from quantization.precision_map import map_hash
from search.audit import EQUAL, EQUAL_NEAR, FLIPS, MIXED, Maps, Verdict, judge, null_arms, totals
from search.controls import random_exactly, random_walk
from search.problem import Problem
from search.statistics import Interval
from sensitivity import ESTIMATORS
from store.database import Store
from store.queries import update_job
from store.tables import Candidate, Job, now

MEASURED = "random maps on the search text"
REFERENCE = "reference"
RANGE = (0.15, 0.6)  # of the way from the smallest to the largest uniform map
NEAR = 10  # a tenth as many exchanges as units
WEIGHT_ERROR = "weight-error"  # a null arm, always judged along: it knows nothing of the loss

Choice = NDArray[np.intp]


@dataclass(frozen=True)
class AuditOptions:
    """What to audit.

    Args:
        estimators: names; all for none.
        mixed: maps of sizes between `between` (average bits).
        equal: maps of each size in `equal_bits`, drawn unit by unit; as many again near the
            uniform map of that size, where a search looks.
        flips: single changes of the unquantized model.
        pairs: of how many units, the most sensitive ones, to measure all interactions.
    """

    estimators: tuple[str, ...] = ()
    mixed: int = 50
    equal: int = 20
    flips: int = 30
    pairs: int = 0
    between: tuple[float, float] | None = None
    equal_bits: tuple[float, ...] = ()


def run_audit(
    plan: Plan,
    store: Store,
    open_pool: OpenPool,
    progress: Progress,
    options: AuditOptions,
    cache: str | None = None,
) -> Job:
    """Audit the estimators on a planned job; the job has `audit` among its facts then."""
    for name in options.estimators:
        ESTIMATORS[name]
    job = open_planned(plan, store)
    # those of an earlier audit cost nothing, and the best should be the best of all
    known = [e["name"] for e in job.facts.get("audit", {}).get("estimators", ())]
    asked = options.estimators or ESTIMATORS
    names = tuple(dict.fromkeys([*asked, *known, WEIGHT_ERROR]))
    problem = plan.problem(np.zeros(plan.bytes_table.shape))
    drawn = _draw(plan, problem, options)
    with sharing(open_pool, spec_of(plan, cache), store, job.id) as pool:
        run = Run(plan, store, pool, progress, job)
        progress.expect(_expected_work(plan, names, len(drawn)))
        prepare(pool, progress)
        measure_reference(run)
        scores, unable = _scores(run, names)
        candidates = [candidate for _, _, candidate in drawn]
        measure(run, candidates, plan.texts["search"], MEASURED)
        maps = _measured(run, drawn)
        document = {**_document(run, scores, maps, problem), "unable": unable}
        try:
            pairs = _interactions(run, scores[document["default"]], options.pairs)
        except MeasurementError as error:  # the verdicts stand without
            pairs, unable["interactions"] = None, str(error)
    return update_job(store, job.id, facts={"audit": {**document, "interactions": pairs}})


def _scores(run: Run, names: Sequence[str]) -> tuple[dict[str, Scores], dict[str, str]]:
    """The tables of those that can score this job's units, and what the others say.

    Raises:
        MeasurementError: none of them can.
    """
    scores, unable = {}, {}
    for name in names:
        if run.plan.online and not ESTIMATORS[name].online:
            unable[name] = f"{name} knows nothing of KV caches and activations; it was left out"
            continue
        needed, there = _most_bytes(run.plan, name), memory_bytes()
        if needed > there:
            unable[name] = (
                f"{name} would need {needed / 1e9:.1f} GB for a task, and there are "
                f"{there / 1e9:.1f} GB; it was left out"
            )
            continue
        try:
            scores[name] = score(run, name)
        except MeasurementError as error:
            unable[name] = str(error)
    if not scores:
        raise MeasurementError("; ".join(unable.values()))
    return scores, unable


def _most_bytes(plan: Plan, estimator: str) -> int:
    """The forecast of an estimator's largest task."""
    text = plan.texts["calibration"]
    shares = ESTIMATORS[estimator].shares(len(plan.layout.units), len(text.ids))
    return max(forecast_bytes(plan, estimator, share) for share in shares)


Drawn = tuple[str, Choice, Candidate]


def _expected_work(plan: Plan, names: Sequence[str], maps: int) -> dict[str, float]:
    config, units = plan.config, len(plan.layout.units)
    work = {BANK: float(BANK_WEIGHT), MEASURED: float(maps * config.texts.search.chunks)}
    for name in names:
        shares = ESTIMATORS[name].shares(units, config.texts.calibration.chunks)
        work[f"sensitivity: {name}"] = float(ESTIMATE_WEIGHT * len(shares))
    return work


def _draw(plan: Plan, problem: Problem, options: AuditOptions) -> list[Drawn]:
    """The maps to measure, the same ones for the same job: set, choice, candidate."""
    generator = np.random.default_rng(plan.config.seed)
    fixed = plan.fixed_bytes - plan.other_bytes

    def nbytes(bits: float) -> int:
        return fixed + round(bits * plan.quantizable_numel / 8)

    found: list[Drawn] = []
    reference = len(plan.menu)
    rows, columns = np.nonzero(plan.offered & plan.open_units[:, None])
    lossy = [i for i, c in enumerate(columns) if not plan.menu[c].exact]
    for i in generator.permutation(lossy)[: options.flips]:
        choice = np.full(len(plan.offered), reference, dtype=np.intp)
        choice[rows[i]] = columns[i]
        found.append((FLIPS, choice, _candidate(plan, choice)))
    low, high = options.between or _middle_range(plan)
    for bits in low + (high - low) * (np.arange(options.mixed) + 0.5) / max(options.mixed, 1):
        choice = _near(plan, problem, nbytes(float(bits)), generator)
        found.append((MIXED, choice, _candidate(plan, choice)))
    for bits in options.equal_bits or _middle_sizes(plan):
        for _ in range(options.equal):
            choice = random_exactly(problem, weight_bytes.RESOURCE, nbytes(bits), generator)
            found.append((f"{EQUAL} {bits:.4g}", choice, _candidate(plan, choice)))
        steps = max(2, int(plan.open_units.sum()) // NEAR)
        for _ in range(options.equal):
            choice = _near(plan, problem, nbytes(bits), generator, steps)
            found.append((f"{EQUAL_NEAR} {bits:.4g}", choice, _candidate(plan, choice)))
    return found


def _near(
    plan: Plan,
    problem: Problem,
    nbytes: int,
    generator: np.random.Generator,
    steps: int | None = None,
) -> Choice:
    """A random map of a size: some exchanges (any number) away from the nearest uniform map."""
    near = min(
        _uniforms(plan),
        key=lambda c: abs(problem.total_cost(c, weight_bytes.RESOURCE) - nbytes),
        default=None,
    )
    start = random_exactly(problem, weight_bytes.RESOURCE, nbytes, generator, near)
    if steps is None:
        steps = int(generator.integers(1, max(2, int(plan.open_units.sum()) // 2)))
    return random_walk(problem, weight_bytes.RESOURCE, start, steps, generator)


def _uniform_bits(plan: Plan) -> list[float]:
    bits = sorted({plan.average_bits(choice) for choice in _uniforms(plan)})
    if len(bits) < 2:
        raise ConfigError(
            "an audit needs two uniform maps to draw between, and this menu has "
            f"{len(bits)}; give --between and --equal-bits, or a menu whose schemes fit all layers"
        )
    return bits


def _middle_range(plan: Plan) -> tuple[float, float]:
    """From where maps work badly to where they work well, between the ends of the menu."""
    sizes = _uniform_bits(plan)
    low, high = (sizes[0] + r * (sizes[-1] - sizes[0]) for r in RANGE)
    return low, high


def _middle_sizes(plan: Plan) -> list[float]:
    """Two sizes of interest: the job's middle budgets, or those of the middle uniform maps."""
    sizes = [] if plan.config.budgets else _uniform_bits(plan)
    asked = list(plan.config.budgets) or sizes[1:-1] or sizes
    middle = len(asked) // 2
    return asked[max(0, middle - 1) : middle + 1]


def _candidate(plan: Plan, choice: Choice) -> Candidate:
    """A map to measure, that no job keeps; column S is the reference."""
    names = [None if c == len(plan.menu) else plan.menu[c] for c in choice]
    pairs = [(REFERENCE, REFERENCE) if s is None else (s.weight, s.activation) for s in names]
    schemes = [None if scheme is None else scheme.name for scheme in names]
    return Candidate(map_hash=map_hash(plan.layout, pairs), schemes=schemes, failure=None)


def _measured(run: Run, drawn: Sequence[Drawn]) -> Maps:
    """What could be measured."""
    candidates = [candidate for _, _, candidate in drawn]
    found = losses(run.store, run.quality, candidates, run.plan.texts["search"].hashes)
    kept = [(g, choice, found[c.map_hash].kl.mean) for g, choice, c in drawn if c.map_hash in found]
    if not any(group != FLIPS for group, _, _ in kept):
        reasons = sorted({c.failure for c in candidates if c.failure})
        raise MeasurementError(f"no random map could be measured: {'; '.join(reasons)}")
    groups, choices, kl = zip(*kept, strict=True)
    bits = [
        run.plan.average_bits(choice) if group != FLIPS else np.nan
        for group, choice in zip(groups, choices, strict=True)
    ]
    return Maps(np.array(choices), np.array(kl), np.array(bits), list(groups))


def _interactions(run: Run, scores: Scores, count: int) -> dict[str, Any] | None:
    """Pairwise terms of the units that an estimator fears most for, at the two smallest schemes."""
    found = measured_pairs(run, scores.mean, count) if count > 1 else None
    if found is None:
        return None
    return {
        "units": [run.plan.layout.units[u].name for u in found.units],
        "schemes": list(found.schemes),
        "tokens": found.tokens,
        "singles": found.singles.tolist(),
        "pairs": found.pairs.tolist(),
        "excess": found.excess().tolist(),
    }


def _uniforms(plan: Plan) -> list[Choice]:
    return list(uniform_maps(plan, plan.problem(np.zeros(plan.bytes_table.shape))).values())


def _document(run: Run, scores: dict[str, Scores], maps: Maps, problem: Problem) -> dict[str, Any]:
    """The audit as the store keeps it."""
    floor = run.job.facts.get("noise_floor") or 0.0
    # flips leave all other units at the reference, which costs nothing
    tables = {
        name: np.column_stack([np.where(problem.offered, s.mean, 0.0), np.zeros(len(s.mean))])
        for name, s in scores.items()
    }
    verdicts = {name: judge(table, maps, floor) for name, table in tables.items()}
    default = max(verdicts, key=lambda name: np.nan_to_num(verdicts[name].merit, nan=-2.0))
    mixed = [i for i, group in enumerate(maps.groups) if group != FLIPS]
    offered = np.column_stack([problem.offered, np.ones(len(problem.offered), dtype=bool)])
    return {
        "default": default,
        "audited_at": now().isoformat(),
        "estimators": [
            {"name": name, "unit": ESTIMATORS[name].unit, "seconds": scores[name].seconds,
             **_plain(verdict)}
            for name, verdict in verdicts.items()
        ],
        "null_arms": {
            **null_arms(tables[default], maps, offered, _by_bits_alone(run.plan)),
            "weight error alone": _plain(verdicts[WEIGHT_ERROR])["spearman_equal_bits"]
            if WEIGHT_ERROR in verdicts
            else None,
        },
        "noise_floor": floor,
        "text": run.plan.texts["search"].source,
        "tokens": int(run.plan.texts["search"].ids.size),
        "maps": {group: maps.groups.count(group) for group in dict.fromkeys(maps.groups)},
        "measured": {
            "group": [maps.groups[i] for i in mixed],
            "bits": [float(maps.bits[i]) for i in mixed],
            "kl": [float(maps.kl[i]) for i in mixed],
        },
        "predicted": {
            name: [float(x) for x in totals(table, maps.choices)[mixed]]
            for name, table in tables.items()
        },
        "experts": experts_seen(run.plan, scores.values()),
    }  # fmt: skip


def _by_bits_alone(plan: Plan) -> NDArray[np.float64]:
    """What a table would be that knows a unit's size and a scheme's bits, and nothing else."""
    numel = plan.numbers[:, None]
    table = numel * 4.0 ** (-8 * plan.bytes_table / numel)
    return np.column_stack([np.where(plan.offered, table, 0.0), np.zeros(len(numel))])


def _plain(verdict: Verdict) -> dict[str, Any]:
    """As JSON has it: no NaN."""

    def number(x: float | None) -> float | None:
        return None if x is None or not np.isfinite(x) else float(x)

    def interval(i: Interval | None) -> list[float | None] | None:
        return None if i is None else [number(i.mean), number(i.low), number(i.high)]

    return {
        "spearman": number(verdict.spearman.mean),
        "spearman_interval": interval(verdict.spearman),
        "kendall": number(verdict.kendall),
        "spearman_equal_bits": number(verdict.spearman_equal_bits),
        "equal_bits": {name: interval(i) for name, i in verdict.equal_bits.items()},
        "flips": interval(verdict.flips),
        "calibration": {k: number(v) for k, v in asdict(verdict.calibration).items()},
        "residual_by_bits": {k: number(v) for k, v in verdict.residual_by_bits.items()},
    }
