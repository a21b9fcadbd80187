"""What a job measures: uniform and random controls, and the solver's optimum at each budget."""

from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from bitfront.budgets import most_bytes
from bitfront.fronts import PRESET
from bitfront.plan import Plan
from bitfront.serving import limited
from bitfront.sizes import show_joules, show_seconds
from bitfront.uniforms import uniform_maps
from cost_models import weight_bytes
from quantization.checkpoints import load_config
from search.controls import random_at, some_formats
from search.errors import InfeasibleBudgetError
from search.exact import solve, sweep
from search.problem import Choice, Problem
from store.tables import Candidate


def propose(plan: Plan, job_id: int, problems: dict[str, Problem]) -> list[Candidate]:
    """Controls first, then each estimator's optimum at each budget; equal maps once."""
    candidates: dict[str, Candidate] = {}
    any_problem = next(iter(problems.values()))
    most = most_bytes(plan)

    def add(
        choice: Choice,
        origin: str,
        control: str | None = None,
        certificate: dict[str, float] | None = None,
    ) -> None:
        if any_problem.breaks(choice, plan.other_limits) or plan.weight_bytes(choice) > most:
            return  # a control that the menu's rules forbid could end up as the answer
        found = plan.map_hash(choice)
        new = candidate_of(plan, job_id, choice, origin, len(candidates) + 1, control)
        candidate = candidates.setdefault(found, new)
        # a control with a certificate is what the solver would have chosen, too
        candidate.certificate = candidate.certificate or certificate

    uniforms = uniform_maps(plan, any_problem)
    for name, choice in uniforms.items():
        add(choice, f"uniform {name}", "uniform")
    for name, choice in _presets(plan):
        add(choice, f"{PRESET} {name}", PRESET)
    sizes = sorted(plan.weight_bytes(choice) for choice in uniforms.values())
    generator = np.random.default_rng(plan.config.seed)
    asked = plan.config.budgets or plan.config.budgets_bytes
    around = list(plan.budgets) if asked or not sizes else sizes
    for size in _middle(around, plan.config.random_controls):
        limit = size - plan.other_bytes
        allowed = some_formats(any_problem, generator)
        if allowed.smallest(weight_bytes.RESOURCE) <= limit:
            add(random_at(allowed, weight_bytes.RESOURCE, limit, generator), "random", "random")
    solvable = _solvable(plan, any_problem)
    for estimator, problem in problems.items():
        limits = [budget - plan.other_bytes for budget in solvable]
        try:
            solutions = sweep(problem, weight_bytes.RESOURCE, limits, plan.other_limits)
        except InfeasibleBudgetError as error:
            raise InfeasibleBudgetError(f"{error}{_in_seconds(plan)}") from error
        for budget, solution in zip(solvable, solutions, strict=True):
            certificate = {
                "budget": budget,
                "raw_loss": solution.loss,
                "raw_bound": solution.bound,
                "gap": solution.gap,
            }
            origin = f"{estimator}, at most {budget:,} bytes"
            add(solution.choice, origin, certificate=certificate)
    return list(candidates.values())


def _presets(plan: Plan) -> Iterator[tuple[str, Choice]]:
    """The engine's own mixes, of those units that the job decides; only those that its menu has."""
    if plan.engine is None:
        return
    columns = {scheme.weight: column for column, scheme in enumerate(plan.menu)}
    offered = plan.offered
    for name, formats in plan.engine.presets(load_config(plan.checkpoint), plan.layout).items():
        choice = offered.argmax(axis=1).astype(np.intp)
        largest = np.where(offered, plan.bytes_table, -1).argmax(axis=1)
        choice[plan.caches] = largest[plan.caches]
        for u in np.flatnonzero(plan.open_units & ~plan.caches):
            wanted = {formats.get(site.parameter) for site in plan.layout.units[u].stored}
            column = columns.get(wanted.pop() or "") if len(wanted) == 1 else None
            if column is None or not offered[u, column]:
                break
            choice[u] = column
        else:
            yield name, choice


def _in_seconds(plan: Plan) -> str:
    """What limits on nanoseconds are, to those who gave milliseconds; and on nanojoules."""
    found = []
    for own in limited(plan.config.serving, plan.times):
        show = show_seconds if own.spending is plan.times else show_joules
        beside = show(max(own.spending.fixed(own.phase), 0.0))
        found.append(
            f"{own.resource} is what {show(own.most)} leave for the products of weights beside "
            f"{beside} of everything else"
        )
    return f" ({', '.join(found)})" if found else ""


def _solvable(plan: Plan, problem: Problem) -> list[int]:
    """The budgets that other limits leave maps for; all of them, where the user named them.

    Raises:
        InfeasibleBudgetError: none is left.
    """
    asked = plan.config.budgets or plan.config.budgets_bytes
    if asked or not plan.other_limits:
        return list(plan.budgets)
    found = []
    for budget in plan.budgets:
        limits = {weight_bytes.RESOURCE: budget - plan.other_bytes, **plan.other_limits}
        with suppress(InfeasibleBudgetError):
            solve(problem, limits)
            found.append(budget)
    return found or [plan.budgets[-1]]


def candidate_of(
    plan: Plan, job_id: int, choice: Choice, origin: str, point: int = 0, control: str | None = None
) -> Candidate:
    """A map as a candidate of a job; one of a later stage gets its number when it is new."""
    return Candidate(
        job_id=job_id, point=point, map_hash=plan.map_hash(choice), origin=origin, control=control,
        schemes=[scheme.name for scheme in plan.schemes(choice)],
        weight_bytes=plan.weight_bytes(choice), average_bits=plan.average_bits(choice),
        finalist=False,
    )  # fmt: skip


def choice_of(plan: Plan, candidate: Candidate) -> Choice:
    """A candidate's assignment."""
    columns = {scheme.name: i for i, scheme in enumerate(plan.menu)}
    return np.array([columns[scheme] for scheme in candidate.schemes], dtype=np.intp)


def _middle(sizes: list[int], count: int) -> list[int]:
    """`count` of the sizes, from the middle outwards: extremes leave nothing to randomise."""
    order = sorted(range(len(sizes)), key=lambda i: abs(i - (len(sizes) - 1) / 2))
    return [sizes[i] for i in sorted(order[:count])]
