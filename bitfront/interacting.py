"""Pairs of units: measured for those that an estimator fears most for, and solved with.

What two coarse changes cost together is not the sum of both. Where predictions by sums are found to be
off (`ADDITIVE`), a search measures the pairs of some units, adds them to the table, and gets maps of
the quadratic problem; they compete by measurement like all others.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.fronts import INTERACTIONS
from bitfront.plan import Plan
from bitfront.proposals import candidate_of
from bitfront.run import Run
from bitfront.scoring import ESTIMATE_WEIGHT
from cost_models import weight_bytes
from quantization.errors import MeasurementError
from search.controls import uniform
from search.errors import InfeasibleBudgetError
from search.problem import Problem
from search.quadratic import MOST_ENTRIES, Quadratic, solve_quadratic
from sensitivity.interactions import Interactions
from store.queries import find_share, key_of, save_share
from store.tables import Candidate, SensitivityShare
from workers.pool import Task

Floats = NDArray[np.float64]

PAIRS = "pairs of units"
COARSEST = 2  # schemes that pairs are measured at
ADDITIVE = 0.1  # residual (log) of predictions up to which sums are left as they are
SECONDS = 10.0  # of the solver, for each budget


def measured_pairs(run: Run, table: Floats, count: int) -> Interactions | None:
    """Pairs of the `count` units of greatest scores at the two smallest schemes; stored ones again.

    Only units inside the blocks that can get both. None where there aren't two of them.
    """
    units, columns = _chosen(run.plan, table, count)
    if len(units) < 2 or not columns:
        return None
    text = run.plan.texts["calibration"]
    names = tuple(run.plan.menu[c].name for c in columns)
    key = key_of(PAIRS, *vars(run.quality).values(), *sorted(units), *names, text.hashes[0])
    row = find_share(run.store, key)
    with run.progress.stage(PAIRS, int(row is None), ESTIMATE_WEIGHT) as advance:
        if row is None:
            arguments = {"units": units, "schemes": names, "chunks": text.ids[:1]}
            task = Task("interactions", arguments, key=key, table=SensitivityShare)
            [outcome] = run.pool.run([task])
            if outcome.error:
                raise outcome.error
            provenance = {**vars(run.quality), "chunk_hash": text.hashes[0]}
            if outcome.known:
                row = find_share(run.store, key)
                assert row is not None
            else:
                row = _row(key, provenance, outcome.value)
                save_share(run.store, row)
            advance(1)
    n, m = len(units), len(names)
    sums = np.array(row.sums, dtype=np.float64)
    order = tuple(int(u) for u in row.provenance["units"])
    pairs = sums[1:].reshape(n, m, n, m)
    return Interactions(order, names, sums[0].reshape(n, m), pairs, int(row.tokens[0]))


def interact(run: Run, problem: Problem, known: set[str]) -> tuple[list[Candidate], dict[str, Any]]:
    """New candidates that are optimal with measured pairs, at most one for each budget.

    Args:
        run: the job; its predictions have been calibrated.
        problem: the additive problem under the estimator that predicts best.
        known: hashes of the maps that there are.

    Returns:
        The candidates, and what is to be told of them.
    """
    residual = run.job.facts["calibration"][run.job.facts["predicts"]]["residual"]
    pays = residual is None or residual > ADDITIVE
    facts: dict[str, Any] = {
        "residual": residual,
        "used": pays and problem.loss.size <= MOST_ENTRIES,
    }
    found: list[Candidate] = []
    pairs = None
    if facts["used"]:
        try:
            pairs = measured_pairs(run, problem.loss, run.plan.config.interactions)
        except MeasurementError as error:  # a model that can't be cut into blocks
            facts["failed"] = str(error)
    if pairs is not None:
        solved = _solved(run, quadratic(problem, run.plan, pairs))
        found = [c for c in solved if c.map_hash not in known]
        facts |= {
            "units": [run.plan.layout.units[u].name for u in pairs.units],
            "schemes": list(pairs.schemes), "excess": pairs.excess().tolist(),
            "tokens": pairs.tokens, "maps": len(found),
        }  # fmt: skip
    return found, facts


def quadratic(problem: Problem, plan: Plan, pairs: Interactions) -> Quadratic:
    """The problem in nats per token with pairs: scores by a factor fitted to single changes.

    Single changes that were measured take the place of their scores.
    """
    columns = [[scheme.name for scheme in plan.menu].index(name) for name in pairs.schemes]
    at = np.array(pairs.units)[:, None], np.array(columns)[None]
    singles = (pairs.singles / pairs.tokens).clip(min=0)
    usable = (singles > 0) & (problem.loss[at] > 0)
    ratios = np.log(singles[usable]) - np.log(problem.loss[at][usable])
    loss = problem.loss * (np.exp(np.median(ratios)) if len(ratios) else 1.0)
    loss[at] = singles
    units, schemes = loss.shape
    whole = np.zeros((units, schemes, units, schemes))
    n, m = singles.shape
    for k in range(n):
        for s in range(m):
            u, c = pairs.units[k], columns[s]
            whole[u, c, at[0], at[1]] = pairs.pairs[k, s] / pairs.tokens
    flat = whole.reshape(units * schemes, -1)
    return Quadratic(replace(problem, loss=loss), (flat + flat.T) / 2)


def _chosen(plan: Plan, table: Floats, count: int) -> tuple[tuple[int, ...], list[int]]:
    problem = plan.problem(np.zeros(plan.bytes_table.shape))
    flat = {c: uniform(problem, c, ~plan.caches) for c in range(len(plan.menu))}
    sizes = {c: plan.weight_bytes(u) for c, u in flat.items() if u is not None}
    stored = np.asarray(plan.offered[plan.open_units & ~plan.caches].any(axis=0))
    lossy = [c for c in sizes if stored[c] and not plan.menu[c].exact]
    columns = sorted(lossy, key=sizes.__getitem__)[:COARSEST]
    inside = np.array([unit.layer is not None for unit in plan.layout.units])
    inside &= ~plan.caches
    able = np.flatnonzero(plan.offered[:, columns].all(axis=1) & inside & plan.open_units)
    fear = np.nan_to_num(table[able][:, columns].max(axis=1, initial=0.0))
    return tuple(int(u) for u in able[np.argsort(-fear)][:count]), columns


def _row(key: str, provenance: dict[str, Any], found: Interactions) -> SensitivityShare:
    n, m = found.singles.shape
    sums = np.concatenate([found.singles.reshape(1, -1), found.pairs.reshape(n * m, -1)])
    return SensitivityShare(
        key=key, estimator=PAIRS, provenance={**provenance, "units": list(found.units)},
        sums=sums.tolist(), tokens=[float(found.tokens)], experts={}, maps=[], seconds=0.0,
    )  # fmt: skip


def _solved(run: Run, problem: Quadratic) -> list[Candidate]:
    plan, found = run.plan, {}
    for budget in plan.budgets:
        limits = {weight_bytes.RESOURCE: budget - plan.other_bytes, **plan.other_limits}
        try:
            choice = solve_quadratic(problem, limits, SECONDS).choice
        except InfeasibleBudgetError:  # latency leaves no map of this size
            continue
        origin = f"{INTERACTIONS}, at most {budget:,} bytes"
        found[plan.map_hash(choice)] = candidate_of(plan, run.job.id, choice, origin)
    return list(found.values())
