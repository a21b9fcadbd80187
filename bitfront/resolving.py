"""Solving a job's problem again, for a budget that nobody has asked for yet, with no model loaded.

The job keeps the tables that it was solved with; what comes out is predicted, and says so.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitfront import caching, rules
from bitfront.config import JobConfig
from bitfront.fronts import layout_of
from bitfront.sizes import raised, show_joules, show_seconds
from bitfront.spending import FINE
from cost_models.memory import PHASES, Phase
from quantization.errors import BitfrontError
from quantization.precision_map import map_hash
from quantization.schemes import Scheme
from search.errors import InfeasibleBudgetError
from search.problem import Problem
from store.database import Store
from store.queries import candidates_of, find_model, find_tables, save_tables
from store.tables import Job

if TYPE_CHECKING:
    from bitfront.run import Run  # torch
    from bitfront.serving import Times

BYTES = "weight_bytes"


class NoTablesError(BitfrontError):
    """A job that has nothing to be solved again with."""


def keep_tables(run: "Run", problems: dict[str, Problem]) -> None:
    """Keep what the job's problem can be solved with again: losses in nats, bytes, seconds."""
    plan, name = run.plan, run.job.facts["predicts"]
    gain = run.job.facts["calibration"][name]["gain"] or 1.0
    tables: dict[str, Any] = {
        "estimator": name,
        "loss": _plain(np.where(plan.offered, gain * problems[name].loss, np.nan)),
        "other_bytes": plan.other_bytes,
        "numel": plan.quantizable_numel,
        "phases": {},
    }
    if plan.times:
        tables["phases"] = {
            phase: {
                "seconds": _plain(plan.times.tables_s[phase]),
                "overhead_s": plan.times.overhead_s[phase],
                "error": plan.times.errors[phase],
                **_joules(plan.times, phase),
            }
            for phase in PHASES
        }
    save_tables(run.store, run.job.id, tables)


def solve_again(
    store: Store,
    job: Job,
    average_bits: Sequence[float] = (),
    weight_bytes: Sequence[int] = (),
    limits: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The best maps within other budgets, by the job's own tables.

    Args:
        store: where the job is.
        job: done, or near its end.
        average_bits: budgets as bits a weight of the units that the job decides.
        weight_bytes: budgets as bytes of the whole model.
        limits: upper bounds on `decode_s`, `prefill_s`, `decode_j` and `prefill_j`, for all of them;
            by default the job's.

    Raises:
        NoTablesError: the job has none (yet), or no times though they are limited.
        InfeasibleBudgetError: no map is so small, or so fast.
    """
    from search.exact import sweep  # SciPy

    start = time.perf_counter()
    tables = find_tables(store, job.id)
    if tables is None:
        raise NoTablesError(
            f"job {job.id} has no tables to be solved again with: they are kept when a search ends; "
            "wait for its end, or search once more with another budget (what was measured is reused)"
        )
    given = _Given(job, tables)
    serving = job.config.get("serving") or {}
    own = {f"{p}_{unit}": serving.get(f"max_{p}_{unit}") for p in PHASES for unit in "sj"}
    wanted = {**{n: most for n, most in own.items() if most is not None}, **(limits or {})}
    problem, others = given.problem(wanted)
    budgets = sorted({*weight_bytes, *(given.bytes_of(bits) for bits in average_bits)})
    layout = layout_of(job, find_model(store, job.model_hash))
    problem = replace(problem, names=tuple(unit.name for unit in layout.units))
    if budgets and (least := problem.smallest(BYTES) + given.other_bytes) > budgets[0]:
        raise InfeasibleBudgetError(
            f"no map has weight_bytes of at most {budgets[0]:,}: the least, of the whole model, is "
            f"{least:,}; raise the budget"
        )
    bounds = [budget - given.other_bytes for budget in budgets]
    solutions = sweep(problem, BYTES, bounds, others)
    measured = {c.map_hash: c.point for c in candidates_of(store, job.id) if c.finalist}
    found = []
    for budget, solution in zip(budgets, solutions, strict=True):
        schemes = [given.menu[column] for column in solution.choice]
        pairs = [(scheme.weight, scheme.activation) for scheme in schemes]
        cache = caching.held_bytes(job, layout, [scheme.name for scheme in schemes])
        found.append({
            "budget_bytes": budget,
            "weight_bytes": given.weight_bytes(solution.choice) - (cache or 0),
            **({} if cache is None else {"cache_bytes": cache}),
            "average_bits": given.bits_of(solution.choice),
            "predicted_kl": solution.loss,
            "gap": solution.gap,
            **given.spent(solution.choice),
            "schemes": dict(Counter(scheme.name for scheme in schemes)),
            "map": [int(column) for column in solution.choice],
            "measured_as": measured.get(map_hash(layout, pairs)),
        })  # fmt: skip
    return {
        "job": job.id, "estimator": tables["estimator"], "menu": job.facts["menu"],
        "solutions": found, "seconds": time.perf_counter() - start,
    }  # fmt: skip


class _Given:
    """A job's tables as arrays."""

    def __init__(self, job: Job, tables: dict[str, Any]) -> None:
        self._job, self._tables = job, tables
        self.menu = [Scheme.stored(name) for name in job.facts["menu"]]
        self.other_bytes = int(tables["other_bytes"])
        self._bytes = np.array(job.facts["bytes_table"], dtype=np.int64)
        names = job.facts["choices"]
        self._offered = np.array([[s.name in row for s in self.menu] for row in names])
        self._open = self._offered.sum(axis=1) > 1

    def problem(self, limits: dict[str, float]) -> tuple[Problem, dict[str, int]]:
        """The problem, and its limits beside the budget on bytes."""
        menu = JobConfig.model_validate(self._job.config).menu
        loss = np.array(self._tables["loss"], dtype=np.float64)
        offered = self._offered & np.isfinite(loss)
        costs, others = {BYTES: self._bytes}, {}
        for name, most in limits.items():
            table, fixed, error = self._spending(name)
            offered &= np.isfinite(table)
            fine = f"{name.removesuffix('_s').removesuffix('_j')}_n{name[-1]}"
            costs[fine] = np.ceil(np.nan_to_num(table) * FINE).astype(np.int64)
            least = float(np.where(offered, table, np.inf).min(axis=1).sum()) + fixed
            if least > most:
                show = show_seconds if name.endswith("_s") else show_joules
                raise InfeasibleBudgetError(
                    f"no map has {name} of at most {show(most)}: the least is {show(raised(least))}; raise "
                    "the limit"
                )
            careful = most / (1 + error)  # as when the job was searched
            kept = min(most, max(careful, least))
            others[fine] = int((kept - fixed) * FINE) + len(table)
        if changes := rules.changes(menu, self.menu, self._offered):
            costs[rules.CHANGED], others[rules.CHANGED] = changes
        few = rules.few_formats(menu, self.menu)
        return Problem(np.where(offered, loss, 0.0), costs, offered, few), others

    def weight_bytes(self, choice: NDArray[np.intp]) -> int:
        """Of the whole model."""
        return int(self._bytes[np.arange(len(choice)), choice].sum()) + self.other_bytes

    def bits_of(self, choice: NDArray[np.intp]) -> float:
        """Average bits over the units that the job decides."""
        rows = np.flatnonzero(self._open)
        return 8 * int(self._bytes[rows, choice[rows]].sum()) / self._numel

    def bytes_of(self, average_bits: float) -> int:
        """What a budget in average bits is in bytes of the whole model."""
        closed = ~self._open
        pinned = self._bytes[closed].max(axis=1, initial=0, where=self._offered[closed])
        return int(average_bits * self._numel / 8) + int(pinned.sum()) + self.other_bytes

    def spent(self, choice: NDArray[np.intp]) -> dict[str, float]:
        """Predicted seconds and joules of both phases, where the job knows them."""
        rows, found = np.arange(len(choice)), {}
        for phase, known in self._tables["phases"].items():
            for unit in ("s", "j") if "joules" in known else ("s",):
                table, fixed, _ = self._spending(f"{phase}_{unit}")
                found[f"{phase}_{unit}"] = float(table[rows, choice].sum()) + fixed
        return found

    @property
    def _numel(self) -> int:
        """Weights of the units that the job decides."""
        return int(self._tables["numel"])

    def _spending(self, name: str) -> tuple[NDArray[np.float64], float, float]:
        """A table, what every map takes beside it, and the error: of `decode_s` or `prefill_j`."""
        phase, _, unit = name.partition("_")
        found = self._tables["phases"].get(phase)
        if found is None:
            raise NoTablesError(
                f"job {self._job.id} knows no seconds: search with --engine llama.cpp, then ask again"
            )
        if unit == "s":
            names = "seconds", "overhead_s", "error"
        elif "joules" in found:
            names = "joules", "fixed_j", "joules_error"
        else:
            raise NoTablesError(
                f"job {self._job.id} knows no joules; search with --max-{phase}-energy where a counter "
                "can be read, or on a device of the catalogue"
            )
        table, fixed, error = (found[name] for name in names)
        return np.array(table, dtype=np.float64), float(fixed), float(error or 0.0)


def _plain(table: NDArray[np.float64]) -> list[list[float | None]]:
    """As JSON has it."""
    return [[float(x) if np.isfinite(x) else None for x in row] for row in table]


def _joules(times: "Times", phase: Phase) -> dict[str, Any]:
    if isinstance(times.joules, str):
        return {}
    return {
        "joules": _plain(times.joules.table(phase)),
        "fixed_j": times.joules.fixed(phase),
        "joules_error": times.joules.errors[phase],
    }
