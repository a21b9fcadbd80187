"""The plan of a job: model, units, choices, costs, texts and budgets, before anything is measured.

`bitfront search --dry-run` prints it; it loads no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront import rules, serving
from bitfront.budgets import budgets
from bitfront.config import (
    AUTO,
    DEMO,
    ConfigError,
    JobConfig,
    RefinementConfig,
)
from bitfront.demo import NAME, demo_model
from bitfront.serving import Times
from cost_models import cache_bytes, weight_bytes
from cost_models.devices import LOCAL
from engines import Engine, Rules
from evaluation.arithmetic import DTYPES, choose_dtype, memory_bytes
from evaluation.texts import Text, TextRequest, make_texts
from quantization.adapter import describe
from quantization.checkpoints import Checkpoint, load_config, load_tokenizer, resolve
from quantization.imatrix import read_imatrix
from quantization.memory import return_memory
from quantization.precision_map import map_hash
from quantization.quantizers import QUANTIZERS, needs, rendering
from quantization.quantizers.base import REVISION
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.statistics import Imported
from quantization.transforms import TRANSFORMS
from quantization.transforms.checkpoint import Folding
from quantization.units import Layout
from search.problem import Problem
from search.strategies import check_strategy
from sensitivity import ESTIMATORS, menu
from store.queries import key_of
from store.tables import Job, Model

MEMORY_SHARE = 0.5
PACKED = ", packed"


@dataclass(frozen=True)
class Plan:
    """What a job will do.

    Args:
        checkpoint: what is quantized: the model, or what a transform makes of it.
        name: the model's, for people.
        described: the model as it is, before an engine that fuses nothing splits its units.
        choices: the schemes of each unit; one for those that are pinned.
        menu: the columns of all tables.
        bytes_table: units x schemes; `other_bytes` come on top of every map. Units of KV caches
            count with what they hold at the job's workload.
        budgets: upper bounds on weight bytes, rising.
        folding: how `checkpoint` is made, where the job has a transform.
        engine: whose rules and bytes count, where the job names one.
        times: seconds of its maps, once they are known.
        packed: whether the bank holds packed bytes instead of values.
        because: why these estimators, where the job left that open.
        evidence: the audit of another job that says so.
    """

    config: JobConfig
    checkpoint: Checkpoint
    name: str
    layout: Layout
    described: Layout
    choices: tuple[tuple[Scheme, ...], ...]
    menu: tuple[Scheme, ...]
    bytes_table: NDArray[np.int64]
    other_bytes: int
    budgets: tuple[int, ...]
    texts: dict[str, Text]
    dtype: str
    dtype_reason: str
    folding: Folding | None = None
    imatrix: Imported | None = None
    packed: bool = False
    engine: Rules | None = None
    times: Times | None = None
    because: str | None = None
    evidence: dict[str, Any] | None = None

    @property
    def original(self) -> Checkpoint:
        """The model before a transform, whose result may not be there yet."""
        return self.folding.original if self.folding else self.checkpoint

    @property
    def offered(self) -> NDArray[np.bool_]:
        """Units x schemes: what each unit may get."""
        return np.array([[scheme in row for scheme in self.menu] for row in self.choices])

    @property
    def open_units(self) -> NDArray[np.bool_]:
        """The units that the search decides."""
        return np.array([len(row) > 1 for row in self.choices])

    @property
    def caches(self) -> NDArray[np.bool_]:
        """The units that are KV caches."""
        return np.array([unit.kind == "cache" for unit in self.layout.units])

    @property
    def online(self) -> bool:
        """Whether anything is quantized while the model runs: KV caches or activations."""
        return bool(self.caches.any()) or any(s.activation != FULL_PRECISION for s in self.menu)

    @property
    def fixed_bytes(self) -> int:
        """Weight bytes outside the units that the search decides."""
        closed = ~self.open_units
        table = self.bytes_table[closed]
        pinned = table.max(axis=1, initial=0, where=self.offered[closed])
        return int(pinned.sum()) + self.other_bytes

    @property
    def numbers(self) -> NDArray[np.int64]:
        """How many numbers each unit holds: weights, or keys and values at the job's workload."""
        workload = serving.workload_of(self.config.serving)
        found = [
            unit.numel or cache_bytes.unit_numbers(unit, self.layout, workload)
            for unit in self.layout.units
        ]
        return np.array(found)

    @property
    def quantizable_numel(self) -> int:
        """Weights of the units that the search decides, and numbers of the caches among them."""
        return int(self.numbers[self.open_units].sum())

    def problem(self, loss: NDArray[np.float64]) -> Problem:
        """The allocation problem under a loss table."""
        offered = self.offered
        limited = serving.limited(self.config.serving, self.times)
        for own in limited:
            offered = offered & np.isfinite(own.spending.table(own.phase))
        costs = {weight_bytes.RESOURCE: self.bytes_table}
        if self.changes:
            costs[rules.CHANGED] = self.changes[0]
        costs |= {own.resource: own.spending.costs(own.phase) for own in limited}
        few = rules.few_formats(self.config.menu, self.menu)
        names = tuple(unit.name for unit in self.layout.units)
        return Problem(np.where(offered, loss, 0.0), costs, offered, few, names)

    @property
    def changes(self) -> tuple[NDArray[np.int64], int] | None:
        """See `rules.changes`."""
        return rules.changes(self.config.menu, self.menu, self.offered)

    @property
    def other_limits(self) -> dict[str, int]:
        """Limits beside the budgets."""
        limits = {rules.CHANGED: self.changes[1]} if self.changes else {}
        for own in serving.limited(self.config.serving, self.times):
            limits[own.resource] = own.spending.limit(own.phase, own.most, self.offered)
        return limits

    def weight_bytes(self, choice: NDArray[np.intp]) -> int:
        """Exact bytes of all weights (and open KV caches) under a map."""
        return int(self.bytes_table[np.arange(len(choice)), choice].sum()) + self.other_bytes

    def average_bits(self, choice: NDArray[np.intp]) -> float:
        """Bits a number over the units that the search decides."""
        rows = np.flatnonzero(self.open_units)
        return 8 * int(self.bytes_table[rows, choice[rows]].sum()) / self.quantizable_numel

    def schemes(self, choice: NDArray[np.intp]) -> list[Scheme]:
        """The schemes of an assignment, one a unit."""
        return [self.menu[column] for column in choice]

    def map_hash(self, choice: NDArray[np.intp]) -> str:
        """The content hash of the precision map."""
        pairs = [(scheme.weight, scheme.activation) for scheme in self.schemes(choice)]
        return map_hash(self.layout, pairs)

    @property
    def chunks(self) -> dict[str, list[str]]:
        """Hashes of the chunks of each text."""
        return {role: list(text.hashes) for role, text in self.texts.items()}

    @property
    def placeholders(self) -> dict[str, int]:
        """How many were left out of each source, where there were any."""
        return {text.source: text.left_out for text in self.texts.values() if text.left_out}

    @property
    def statistics(self) -> str:
        """Identifies what calibration knows of the model."""
        text = self.texts["calibration"].hash
        return key_of(self.checkpoint.weights_hash, self.dtype, text)

    @property
    def quantizer(self) -> str:
        """The quantizer's identity, with the statistics if it or a format works with them."""
        from quantization.formats import FORMATS

        quantizer = QUANTIZERS[self.config.quantizer]
        name = rendering(quantizer)
        if any(needs(quantizer, FORMATS[scheme.weight]) for scheme in self.menu):
            name += f"@{self.statistics[:16]}{self.imatrix.identity[:16] if self.imatrix else ''}"
        return f"{name}{PACKED}" if self.packed else name  # kernels add up in another order

    @property
    def key(self) -> str:
        """Identifies what the job computes: the same question has the same key."""
        # named by the hashes below, or new since there are jobs: those keep their keys
        named = {"model", "revision", "texts", "dtype", "transform", "imatrix", "bank"}
        if not self.config.refinement.measurements:
            named.add("refinement")
        if not self.config.interactions:
            named.add("interactions")
        exclude: dict[str, Any] = dict.fromkeys(named, True) | {"menu": self.config.menu.silent}
        exclude["serving"] = self.config.serving.silent
        config = self.config.model_dump_json(exclude=exclude)
        texts = [f"{role}:{text.hash}" for role, text in sorted(self.texts.items())]
        extra = [self.quantizer] if self.packed or self.imatrix or REVISION > 1 else []
        if isinstance(self.engine, Engine) and self.config.serving.device == LOCAL:
            extra.append(serving.place_of(self.config.serving, self.engine).of())
        return key_of(self.checkpoint.weights_hash, config, self.dtype, *texts, *extra)


def make_plan(config: JobConfig, *, as_written: bool = False) -> Plan:
    """Resolve everything that a job names; texts without placeholders, or `as_written`.

    Raises:
        BitfrontError: a model, text, format, quantizer or estimator that isn't there.
        InfeasibleBudgetError: a budget below the smallest map's bytes.
    """
    QUANTIZERS[config.quantizer]
    for estimator in config.estimators:
        if estimator != AUTO:
            ESTIMATORS[estimator]
    if config.transform:
        TRANSFORMS[config.transform]
    check_strategy(config.refinement.strategy)
    wanted = config.refinement
    if not wanted.measurements and wanted != RefinementConfig():
        raise ConfigError(
            "refinement.strategy and refinement.minutes say how to refine, but "
            "refinement.measurements is 0; give --refine N, such as 500"
        )
    dtype, reason = choose_dtype(config.dtype)
    source = demo_model() if config.model == DEMO else config.model
    checkpoint = resolve(source, config.revision, config.trust_remote_code)
    engine = serving.engine_of(config.serving)
    described = layout = describe(checkpoint)
    if engine:
        engine.check(load_config(checkpoint))
        layout = described if engine.fuses else described.split()
    if config.menu.cache:
        layout = layout.with_caches(engine.cache_sharing if engine else "apart")
        if config.serving.tensor_parallel > 1:
            raise ConfigError(
                "formats of the KV cache can't be chosen under tensor parallelism yet; leave "
                "--tensor-parallel or the cache's formats out"
            )
    choices = rules.choices(layout, config.menu, engine)
    if not any(len(row) > 1 for row in choices):
        raise ConfigError(
            f"the menu leaves nothing to decide: of {', '.join(config.menu.schemes)} every "
            "unit can get one scheme only"
            + (rules.why_not(layout, config.menu, engine) or "; give two or more that apply")
        )
    columns = tuple(menu(choices))
    requests = {
        role: TextRequest(text.source, text.chunks, text.length) for role, text in config.texts
    }
    plan = Plan(
        config=config,
        checkpoint=checkpoint,
        name=NAME if config.model == DEMO else config.model,
        layout=layout,
        choices=choices,
        menu=columns,
        bytes_table=_bytes(config, layout, columns, engine),
        other_bytes=weight_bytes.other_bytes(layout, engine, load_config(checkpoint)),
        budgets=(),
        texts=make_texts(load_tokenizer(checkpoint), requests, as_written=as_written),
        dtype=str(dtype).removeprefix("torch."),
        dtype_reason=reason,
        described=described,
        engine=engine,
    )
    _check_disjoint(plan.texts)
    return_memory()  # of the import and the tokenizer; the driver outlives them by hours
    plan = replace(
        plan, budgets=budgets(plan), imatrix=_imported(config, plan), packed=_packed(config, plan)
    )
    return _transformed(plan, config.transform) if config.transform else plan


def plan_again(job: Job, model: Model) -> Plan:
    """The plan of a job of the store.

    Raises:
        ConfigError: its model, quantizer or calibration isn't what it was.
    """
    config = JobConfig.model_validate(job.config)
    # what the arithmetic was tells the statistics apart, and so the folded model
    bank = "packed" if job.facts["quantizer"].endswith(PACKED) else "values"
    same = {"revision": model.revision, "dtype": job.facts["dtype"], "bank": bank}
    config = config.model_copy(update=same)
    plan = make_plan(config)
    measured = job.facts.get("chunks")
    if plan.placeholders and plan.chunks != measured:
        plan = make_plan(config, as_written=True)  # as earlier versions read them
    if plan.checkpoint.weights_hash != job.model_hash:
        raise ConfigError(
            f"the model at '{plan.checkpoint.name}' has changed since job {job.id}; search again"
        )
    if plan.quantizer != job.facts["quantizer"]:
        raise ConfigError(
            f"quantizer or calibration have changed since job {job.id}: it measured "
            f"{job.facts['quantizer']}, and this would be {plan.quantizer}; search again"
        )
    return plan


def admitting(plan: Plan, schemes: Sequence[Scheme]) -> Plan:
    """The plan with a map's schemes (one a unit) beside what its menu allows."""
    pairs = zip(plan.choices, schemes, strict=True)
    choices = tuple(tuple(dict.fromkeys((*row, scheme))) for row, scheme in pairs)
    columns = tuple(dict.fromkeys((*plan.menu, *schemes)))
    table = _bytes(plan.config, plan.layout, columns, plan.engine)
    return replace(plan, choices=choices, menu=columns, bytes_table=table, times=None)


def _bytes(
    config: JobConfig, layout: Layout, columns: Sequence[Scheme], engine: Rules | None
) -> NDArray[np.int64]:
    """Units x schemes."""
    caches = cache_bytes.table(layout, columns, serving.workload_of(config.serving))
    return weight_bytes.table(layout, columns, engine) + caches


def _imported(config: JobConfig, plan: Plan) -> Imported | None:
    """The importance matrix that the job names."""
    if config.imatrix is None:
        return None
    if config.transform:
        raise ConfigError(
            f"an imatrix is of the model as it is, and {config.transform} rescales its channels; "
            "leave one of them out"
        )
    architecture = load_config(plan.checkpoint).model_type
    return Imported.of(read_imatrix(Path(config.imatrix), plan.layout, architecture))


def _packed(config: JobConfig, plan: Plan) -> bool:
    """Whether to keep packed bytes: asked for, or the values wouldn't fit."""
    if config.bank != "auto":
        return config.bank == "packed"
    numel = sum(u.numel * len(row) for u, row in zip(plan.layout.units, plan.choices, strict=True))
    return numel * DTYPES[plan.dtype].itemsize > MEMORY_SHARE * memory_bytes()


def _transformed(plan: Plan, name: str) -> Plan:
    """The plan for the folded model, which has the same layout.

    Transforms that are tuned to a format get the menu's middle one by average bits, the smaller of
    two: the smallest is often too coarse for the search to take.
    """
    format = None
    if TRANSFORMS[name].tuned:
        bits = {}
        for column, scheme in enumerate(plan.menu):
            rows = plan.offered[:, column] & plan.open_units & ~plan.caches
            if scheme.weight != FULL_PRECISION and rows.any():
                numel = sum(plan.layout.units[row].numel for row in np.flatnonzero(rows))
                bits[scheme.weight] = int(plan.bytes_table[rows, column].sum()) / numel
        if not bits:
            raise ConfigError(f"the transform {name} is tuned to a format, and the menu has none")
        format = sorted(bits, key=lambda weight: (bits[weight], weight))[(len(bits) - 1) // 2]
    folding = Folding(plan.checkpoint, name, format, plan.statistics)
    return replace(plan, checkpoint=folding.checkpoint, folding=folding)


def _check_disjoint(texts: dict[str, Text]) -> None:
    """Refuse texts that share a chunk: held-out text that was searched on proves nothing."""
    for role, other in combinations(texts, 2):
        if shared := set(texts[role].hashes) & set(texts[other].hashes):
            raise ConfigError(
                f"{role} and {other} text share {len(shared)} chunks "
                f"('{texts[role].source}' and '{texts[other].source}'); give different texts, or "
                "name the source the same way for both, and it will be divided"
            )
