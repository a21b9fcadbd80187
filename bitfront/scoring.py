"""Sensitivity of a job: shares of an estimator's table from the store, the missing ones from workers."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.plan import Plan
from bitfront.run import Run
from evaluation.arithmetic import DTYPES
from quantization.errors import MeasurementError
from sensitivity import ESTIMATORS, Experts, MeasuredMap, RawTable, Share, Work, merge
from store.queries import find_share, key_of, save_share
from store.tables import SensitivityShare
from workers.pool import Task

ESTIMATE_WEIGHT = 12
"""How long a task takes in measurements of a candidate on a chunk, for the bar's first estimate."""
LIBRARIES_BYTES = 800 * 10**6
"""What a worker takes before it has read a weight."""
USUAL = "fisher-quantized"
"""Stands for `auto` in a forecast."""
FEW_TOKENS = 64
"""An expert that saw fewer is named."""


@dataclass(frozen=True)
class Scores:
    """An estimator's table over the whole calibration text.

    Args:
        mean: units x schemes, raw scores per token.
        experts: by unit, how many tokens each expert saw.
        seconds: of all tasks together, stored ones with what they took at the time.
    """

    mean: NDArray[np.float64]
    experts: dict[int, list[float]]
    seconds: float


def score(run: Run, estimator: str) -> Scores:
    """Run an estimator, but for the shares of its table that the store has."""
    plan = run.plan
    text = plan.texts["calibration"]
    shares = ESTIMATORS[estimator].shares(len(plan.layout.units), len(text.ids))
    provenance = {
        "weights_hash": plan.checkpoint.weights_hash,
        "quantizer": run.quality.quantizer,
        "dtype": plan.dtype,
        "text_hash": text.hash,
        "choices": key_of(*(",".join(s.name for s in row) for row in plan.choices)),
    }
    revision = ESTIMATORS[estimator].revision
    name = estimator if revision == 1 else f"{estimator}#{revision}"
    keys = {share: key_of(name, *provenance.values(), share) for share in shares}
    found = {share: row for share in shares if (row := find_share(run.store, keys[share]))}
    missing = [share for share in shares if share not in found]
    with run.progress.stage(f"sensitivity: {estimator}", len(missing), ESTIMATE_WEIGHT) as advance:
        tasks = [
            Task(
                "estimate", {"estimator": estimator, "chunks": text.ids, "share": s}, label=s,
                memory_bytes=forecast_bytes(plan, estimator, s),
                key=keys[s], table=SensitivityShare,
            )
            for s in missing
        ]  # fmt: skip
        with closing(run.pool.run(tasks)) as outcomes:  # an audit goes on with the next estimator
            for outcome in outcomes:
                if outcome.error:
                    raise outcome.error
                share = outcome.task.label
                if outcome.known:
                    row = find_share(run.store, keys[share])
                    assert row is not None
                else:
                    row = _share_row(keys[share], estimator, provenance, *outcome.value)
                    save_share(run.store, row)
                found[share] = row
                advance(1)
    whole = merge(_table(found[share]) for share in shares)
    table = whole.mean()
    bad = ~np.isfinite(table) & plan.offered
    if bad.any():
        unit = plan.layout.units[int(np.argwhere(bad)[0][0])].name
        outside = all(plan.layout.units[int(u)].layer is None for u, _ in np.argwhere(bad))
        way_out = (
            "it may know nothing of embedding and head, which this menu opens: pin them"
            if outside
            else "try --dtype float32"
        )
        raise MeasurementError(
            f"the estimator {estimator} has no finite score for {unit} (and {int(bad.sum()) - 1} "
            f"other entries); {way_out}, or leave it out of the job's estimators"
        )
    experts = {unit: own.tokens.tolist() for unit, own in whole.experts.items()}
    return Scores(table, experts, sum(found[share].seconds for share in shares))


def experts_seen(plan: Plan, scores: Iterable[Scores]) -> list[dict[str, Any]]:
    """Tokens that each expert saw, by unit, and how many experts saw few; empty without experts."""
    experts = next((s.experts for s in scores if s.experts), {})
    return [
        {
            "unit": plan.layout.units[u].name, "tokens": tokens,
            "few": sum(count < FEW_TOKENS for count in tokens),
        }
        for u, tokens in sorted(experts.items())
    ]  # fmt: skip


def forecast_bytes(plan: Plan, estimator: str, share: Share, text: str = "calibration") -> int:
    """The memory that a task of an estimator will need on a worker, on chunks of a text."""
    itemsize = DTYPES[plan.dtype].itemsize
    work = Work(plan.layout, plan.texts[text].ids.shape[1], itemsize, roomy=not plan.packed)
    return ESTIMATORS[estimator].forecast_bytes(plan.choices, share, work)


def worker_bytes(plan: Plan) -> int:
    """The memory that a worker of a job will have to itself: its libraries and its largest task.

    A replica is pages of the bank, which the workers of a node share and the system may drop; `auto`
    counts as `USUAL`.
    """
    units, chunks = len(plan.layout.units), len(plan.texts["calibration"].ids)
    names = [name if name in ESTIMATORS else USUAL for name in plan.config.estimators]
    tasks = [
        forecast_bytes(plan, name, share)
        for name in dict.fromkeys(names)
        for share in ESTIMATORS[name].shares(units, chunks)
    ]
    return LIBRARIES_BYTES + max(tasks)


def _share_row(
    key: str, estimator: str, provenance: dict[str, str], table: RawTable, seconds: float
) -> SensitivityShare:
    experts = {
        str(unit): {"sums": _plain(own.sums), "tokens": own.tokens.tolist()}
        for unit, own in table.experts.items()
    }
    return SensitivityShare(
        key=key, estimator=estimator, provenance=provenance, sums=_plain(table.sums),
        tokens=table.tokens.tolist(), experts=experts,
        maps=[asdict(measured) for measured in table.maps], seconds=seconds,
    )  # fmt: skip


def _plain(sums: NDArray[np.float64]) -> list[list[float | None]]:
    """As JSON has it: no NaN."""
    return [[None if np.isnan(x) else float(x) for x in row] for row in sums]


def _table(row: SensitivityShare) -> RawTable:
    experts = {
        int(unit): Experts(np.array(own["sums"], dtype=np.float64), np.array(own["tokens"]))
        for unit, own in (row.experts or {}).items()
    }
    maps = tuple(MeasuredMap(**{**m, "choice": tuple(m["choice"])}) for m in row.maps or ())
    return RawTable(np.array(row.sums, dtype=np.float64), np.array(row.tokens), experts, maps)
