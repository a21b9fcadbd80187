"""`bitfront bench allocators`: maps that different allocators chose, compared at equal bytes.

One quantizer for all, the same text, each difference paired by chunk. A map says bits, in groups of one
size, or names a format for each linear, so that whole menus can meet. Beside the given maps stand the
null (random maps of the same bytes) and the control that mixed precision must beat to be worth it:
uniform maps of finer groups that cost as much. Measurements are kept in the store like all others.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from bitfront.config import ConfigError, load_config
from bitfront.console import errors, print_json, print_table
from bitfront.measuring import measure
from bitfront.pipeline import spec_of
from bitfront.plan import Plan, make_plan
from bitfront.preparing import prepare
from bitfront.progress import Lines, Progress, RichProgress
from bitfront.proposals import candidate_of
from bitfront.run import Run
from bitfront.searching import open_pool
from cost_models import weight_bytes
from evaluation.texts import Text, TextRequest, consecutive
from quantization.checkpoints import load_tokenizer
from quantization.errors import BitfrontError
from quantization.formats import FORMATS
from quantization.quantizers import QUANTIZERS, needs
from search.controls import random_at, uniform
from search.problem import Choice
from search.statistics import Interval, divergence_interval, paired_difference
from store.database import Store
from store.queries import measurements
from store.tables import Job

SCALE_BITS = 16
CALIBRATION = 32  # chunks, where something learns from them
NEAR = 0.2  # bits that a control may lie below its budget
SLACK = 1e-4  # bits that a map may lie above its budget: files round
NULL, CONTROL, GIVEN = "random", "uniform", "given"


@dataclass(frozen=True)
class Contest:
    """What to compare, and on what.

    Args:
        maps: files of linear name -> bits, as other tools write them, or format.
        budgets: average bits, scales included; a map competes at the lowest one that it is within.
        group: weights that share a scale.
        finer: group sizes of the uniform controls.
        random: null maps at each budget.
    """

    model: str
    text: str
    maps: tuple[Path, ...]
    budgets: tuple[float, ...]
    chunks: int = 24
    length: int = 512
    quantizer: str = "rtn"
    calibration: str | None = None
    bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    group: int = 64
    finer: tuple[int, ...] = (32, 16)
    random: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Entry:
    """A competitor at a budget, measured.

    Args:
        kl: nats per token, with 95 % interval over chunks.
        over_best: its KL less that of the best given map at the budget, in pairs.
    """

    budget: float
    name: str
    kind: str
    average_bits: float
    kl: Interval
    over_best: Interval | None


def run(contest: Contest, store: Store, address: str, as_json: bool) -> None:
    """Compare, and print the leaderboard."""
    with (RichProgress if errors.is_terminal else Lines)(errors) as progress:
        entries = compare(contest, store, address, progress)
    if as_json:
        print_json(leaderboard_json(contest, entries))
    else:
        print_table(leaderboard(contest, entries))


def compare(contest: Contest, store: Store, address: str, progress: Progress) -> list[Entry]:
    """Measure all competitors; entries by budget, best first.

    Raises:
        BitfrontError: a map that isn't this model's, or that is above all budgets.
    """
    _check_text(contest, _menu(contest))
    plan = _plan(contest, [])
    maps = {path: _read(path, contest, _linears(plan)) for path in contest.maps}
    if formats := {f for given in maps.values() for f in given.values()} - {*_menu(contest)}:
        plan = _plan(contest, sorted(formats))
        _check_text(contest, [scheme.weight for scheme in plan.menu])
    size = TextRequest(contest.text, contest.chunks, contest.length)
    text = consecutive(load_tokenizer(plan.checkpoint), size)
    competitors = _competitors(contest, plan, maps)
    spec = spec_of(plan, os.environ.get("BITFRONT_CACHE"))
    candidates = {plan.map_hash(c): candidate_of(plan, 0, c, kind) for _, _, kind, c in competitors}
    with open_pool(spec, address, None) as pool:
        prepare(pool, progress)
        job = Job(key=plan.key, weights_hash=plan.checkpoint.weights_hash, config={}, facts={})
        bench = Run(plan, store, pool, progress, job)
        measure(bench, list(candidates.values()), text, "measuring maps")
    if failed := next((c.failure for c in candidates.values() if c.failure), None):
        raise BitfrontError(failed)
    return _entries(bench, text, competitors)


def _menu(contest: Contest) -> list[str]:
    """The formats of maps that say bits, and the controls'."""
    menu = [f"int{b}-g{contest.group}" for b in contest.bits]
    finer = [(b, group) for b in contest.bits for group in contest.finer]
    menu += [f"int{b}-g{g}" for b, g in finer if _budget_near(contest, b + SCALE_BITS / g)]
    return list(dict.fromkeys(menu))


def _plan(contest: Contest, formats: Sequence[str]) -> Plan:
    """A job with that menu and more formats."""
    source, chunks = (
        (contest.calibration, CALIBRATION) if contest.calibration else (contest.text, 1)
    )
    overrides: dict[str, Any] = {
        "menu": ",".join([*_menu(contest), *formats]), "quantizer": contest.quantizer,
        "budgets": sorted(set(contest.budgets)),
        "texts.calibration": {"source": source, "chunks": chunks, "length": contest.length},
    }  # fmt: skip
    return make_plan(load_config(contest.model, None, overrides))


def _budget_near(contest: Contest, bits: float) -> float | None:
    """The budget that a uniform map of so many bits is the control of."""
    return next((b for b in sorted(contest.budgets) if b - NEAR < bits <= b + SLACK), None)


def _competitors(
    contest: Contest, plan: Plan, maps: dict[Path, dict[str, str]]
) -> list[tuple[float, str, str, Choice]]:
    """Budget, name, kind and map of each."""
    found = []
    columns = {scheme.weight: c for c, scheme in enumerate(plan.menu)}
    for path, given in maps.items():
        choice = _choice(path, given, plan, columns)
        bits = plan.average_bits(choice)
        within = [budget for budget in sorted(contest.budgets) if bits <= budget + SLACK]
        if not within:
            raise BitfrontError(
                f"{path} has {bits:.4f} average bits, more than the largest of --bits "
                f"({max(contest.budgets):g}); give a larger one"
            )
        found.append((within[0], path.stem, GIVEN, choice))
    own = [f"int{b}-g{contest.group}" for b in contest.bits]
    offered = plan.offered.copy()
    foreign = np.array([scheme.weight not in own for scheme in plan.menu])
    offered[plan.open_units[:, None] & foreign] = False
    whole = plan.problem(np.zeros(plan.offered.shape))
    problem = replace(whole, offered=offered)
    for scheme, column in columns.items():
        flat = uniform(whole, column)
        near = None if flat is None else _budget_near(contest, plan.average_bits(flat))
        if flat is not None and near is not None:
            found.append((near, f"uniform {scheme}", CONTROL, flat))
    for budget, limit in zip(sorted(set(contest.budgets)), plan.budgets, strict=True):
        for n in range(contest.random):
            generator = np.random.default_rng([contest.seed, n, limit])
            choice = random_at(problem, weight_bytes.RESOURCE, limit - plan.other_bytes, generator)
            found.append((budget, f"random {n + 1}", NULL, choice))
    return found


def _check_text(contest: Contest, formats: Sequence[str]) -> None:
    """Raise `ConfigError` where what is measured would be calibrated on no text, or on the same."""
    quantizer = QUANTIZERS[contest.quantizer]
    other = (
        contest.calibration and Path(contest.calibration).resolve() != Path(contest.text).resolve()
    )
    if not other and any(needs(quantizer, FORMATS[name]) for name in formats):
        raise ConfigError(
            f"the quantizer {contest.quantizer} or a format of the maps learns from text; give "
            f"--calibration-text, another one than {contest.text}, which the maps are measured on"
        )


def _linears(plan: Plan) -> list[list[str]]:
    """Names of the linears of each unit that maps decide."""
    units = (plan.layout.units[u] for u in np.flatnonzero(plan.open_units))
    return [[site.name.removesuffix(".weight") for site in unit.sites] for unit in units]


def _read(path: Path, contest: Contest, linears: Sequence[Sequence[str]]) -> dict[str, str]:
    """The format of each linear that maps decide, in a file of linear name -> bits or format."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        found = {n: x if isinstance(x, str) else int(x) for n, x in given.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BitfrontError(f"{path} is no map of linear name -> bits: {error}") from error
    for names in linears:
        if missing := [name for name in names if name not in found]:
            raise BitfrontError(f"{path} says nothing of {missing[0]}; every linear needs bits")
        if len({found[name] for name in names}) > 1:
            raise BitfrontError(
                f"{path} gives {' and '.join(names)} different bits, but engines load them fused"
            )
        value = found[names[0]]
        if isinstance(value, int) and value not in contest.bits:
            raise ConfigError(
                f"{path}: {value} bits at {names[0]} are outside the menu "
                f"{', '.join(map(str, contest.bits))}"
            )
    decided = {name: found[name] for names in linears for name in names}
    return {n: x if isinstance(x, str) else f"int{x}-g{contest.group}" for n, x in decided.items()}


def _choice(path: Path, given: dict[str, str], plan: Plan, columns: dict[str, int]) -> Choice:
    """A map as a choice."""
    choice = plan.offered.argmax(axis=1).astype(np.intp)
    for u, names in zip(np.flatnonzero(plan.open_units), _linears(plan), strict=True):
        column = columns.get(given[names[0]])
        if column is None or not plan.offered[u, column]:
            raise BitfrontError(
                f"{path}: the format {given[names[0]]} can't be had at {names[0]}; name a weight "
                "format that applies there"
            )
        choice[u] = column
    return choice


def _entries(
    run: Run, text: Text, competitors: Sequence[tuple[float, str, str, Choice]]
) -> list[Entry]:
    maps = {run.plan.map_hash(choice) for *_, choice in competitors}
    keys = [run.quality.of(name, chunk) for name in maps for chunk in text.hashes]
    known = measurements(run.store, keys)

    def sums(choice: Choice) -> NDArray[np.float64]:
        name = run.plan.map_hash(choice)
        return np.array([known[run.quality.of(name, chunk)].kl_sum for chunk in text.hashes])

    tokens = np.full(len(text.hashes), text.ids.shape[1] - 1.0)
    entries = []
    for budget in sorted({budget for budget, *_ in competitors}):
        rows = [(n, k, c, sums(c)) for b, n, k, c in competitors if b == budget]
        given = [row for row in rows if row[1] == GIVEN]
        best = min(given, key=lambda row: row[3].sum(), default=None)
        for name, kind, choice, found in sorted(rows, key=lambda row: float(row[3].sum())):
            over = None
            if best is not None and choice is not best[2]:
                over = paired_difference(found, best[3], tokens)
            bits = run.plan.average_bits(choice)
            kl = divergence_interval(found, tokens)
            entries.append(Entry(budget, name, kind, bits, kl, over))
    return entries


def leaderboard(contest: Contest, entries: Sequence[Entry]) -> Table:
    """The entries for people."""
    table = Table(
        title=f"Allocators at equal bytes: {contest.model}, {contest.quantizer}, "
        f"groups of {contest.group}, {contest.chunks} x {contest.length} tokens of {contest.text}",
        caption="95 % intervals over chunks; differences to the budget's best given map are paired.",
        title_justify="left", caption_justify="left",
    )  # fmt: skip
    for name in ("at most", "map", "bits", "KL, nats/token (95 %)", "over the best (95 %)"):
        table.add_column(name, justify="left" if name == "map" else "right")
    last = None
    for entry in entries:
        if last is not None and entry.budget != last:
            table.add_section()
        over = entry.over_best
        table.add_row(
            "" if entry.budget == last else f"{entry.budget:g}", entry.name,
            f"{entry.average_bits:.4f}",
            f"{entry.kl.mean:.4f} ({entry.kl.low:.4f} to {entry.kl.high:.4f})",
            f"{over.mean:+.4f} ({over.low:+.4f} to {over.high:+.4f})" if over else "best",
            style=None if entry.kind == GIVEN else "dim",
        )  # fmt: skip
        last = entry.budget
    return table


def leaderboard_json(contest: Contest, entries: Sequence[Entry]) -> dict[str, Any]:
    """The entries for programs."""
    setting = {k: v for k, v in asdict(contest).items() if k != "maps"}
    return {"setting": setting, "entries": [asdict(entry) for entry in entries]}
