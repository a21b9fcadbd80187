"""A store full of jobs as searches leave them, without running any: for what is asked of a service.

Layout, facts, tables and events have the form that the pipeline gives them; figures are drawn, with
a KL that falls by a factor of four a bit. Nothing here is a result.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import insert

from bitfront.config import config_of
from quantization.precision_map import map_hash
from quantization.schemes import Scheme
from quantization.units import CacheLayer, Layout, Site, Unit, unit_name
from store.database import Store
from store.events import add_event, log
from store.queries import (
    QualityKey,
    key_of,
    known_keys,
    reference_hash,
    save_model,
    save_tables,
)
from store.submissions import DONE
from store.tables import Candidate, Job, Measurement, Model

MENU = {"int2-g64": 2.25, "int3-g64": 3.25, "int4-g64": 4.25, "int6-g64": 6.25, "int8-g64": 8.25}
PINNED = "bf16"
FINALISTS, CANDIDATES = 18, 40
CHUNKS = {"calibration": 16, "search": 8, "heldout": 24}
TOKENS = 511
BATCH = 5000
"""Rows in a statement."""
ENGINE = {"engine": "llama.cpp", "context": 4096}


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Args:
        measurements: at least so many, with those of refinement on top of the jobs' own.
        layers: of each model.
    """

    models: int = 2
    jobs: int = 60
    measurements: int = 100_000
    layers: int = 30


def fill(store: Store, size: Size, seed: int = 0) -> list[int]:
    """Fill a store with finished jobs; their numbers."""
    rng = np.random.default_rng(seed)
    models = [_model(store, number, size.layers) for number in range(size.models)]
    jobs, rows = [], 0
    for number in range(size.jobs):
        model = models[number % len(models)]
        job, more = _job(store, model, number, rng)
        jobs.append(job)
        rows += more
    left = size.measurements - rows
    if left > 0:
        _insert(store, _refined(models[0], left, rng))
    return jobs


def layout(layers: int, width: int = 576) -> Layout:
    """Of a Llama with fused q/k/v and gate/up; embedding and head are tied."""
    units = [_unit("embedding", None, ("model.embed_tokens", 49152, width))]
    for i in range(layers):
        at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        qkv = [(f"{at}.{name}_proj", width if name == "q" else width // 3, width) for name in "qkv"]
        wide = [(f"{mlp}.{name}_proj", 1536, width) for name in ("gate", "up")]
        units += [
            _unit("linear", i, *qkv),
            _unit("linear", i, (f"{at}.o_proj", width, width)),
            _unit("linear", i, *wide),
            _unit("linear", i, (f"{mlp}.down_proj", width, 1536)),
        ]
    cache = tuple(CacheLayer(2 * width // 3) for _ in range(layers))
    return Layout(tuple(units), (), (2 * layers + 1) * width, cache)


def _unit(kind: Any, layer: int | None, *sites: tuple[str, int, int]) -> Unit:
    found = tuple(Site(name, f"{name}.weight", (rows, columns)) for name, rows, columns in sites)
    return Unit(unit_name(site.name for site in found), kind, found, layer)


def _model(store: Store, number: int, layers: int) -> Model:
    model = Model(
        weights_hash=key_of("model", number), name=f"org/model-{number}", revision=None,
        layout=layout(layers).to_json(),
    )  # fmt: skip
    save_model(store, model)
    return model


def _job(store: Store, model: Model, number: int, rng: np.random.Generator) -> tuple[int, int]:
    """A job with everything that a search leaves; its number, and how many measurements."""
    found = Layout.from_json(model.layout)
    timed = number % 2 == 0
    serving = ENGINE if timed else {}
    menu = {"schemes": [*MENU], "pinned": {"embedding": PINNED, "head": PINNED}}
    config = config_of(model.name, {"menu": menu, "serving": serving, "estimators": ["fisher"]})
    names = [*MENU, PINNED]
    open_units = np.array([unit.kind == "linear" for unit in found.units])
    sizes = np.array([unit.numel for unit in found.units])
    bits = np.array([*MENU.values(), 16.0])
    costs = (sizes[:, None] * bits / 8).astype(np.int64)
    loss = rng.lognormal(-6, 1, (len(sizes), 1)) * 4.0 ** -(bits - 2) * (sizes / 1e6)[:, None]
    text = number // (2 * 20)  # jobs of a model share a text, but for the later ones
    chunks = {
        role: [key_of(role, text, chunk) for chunk in range(count)]
        for role, count in CHUNKS.items()
    }
    quality = QualityKey(model.weights_hash, "rtn", "float32")
    facts: dict[str, Any] = {
        "menu": names, "bytes_table": costs.tolist(), "dtype": quality.dtype,
        "choices": [[*MENU] if is_open else [PINNED] for is_open in open_units],
        "quantizer": quality.quantizer, "transform": None, "budgets": [], "split": False,
        "estimators": ["fisher"], "chunks": chunks, "noise_floor": 1e-5, "predicts": "fisher",
        "calibration": {"fisher": {"unit": "nats", "gain": 1.2, "maps": 20, "residual": 0.25}},
        "stages": {"finalists": {"seconds": 60.0, "steps": FINALISTS * CHUNKS["heldout"]}},
    }  # fmt: skip
    candidates = list(_candidates(found, names, open_units, costs, loss, rng))
    if timed:
        facts |= _times([c["map_hash"] for c in candidates if c["finalist"]], rng)
    with store.session() as session:
        job = Job(
            key=key_of("filled", number), weights_hash=model.weights_hash, state=DONE, attempts=0,
            config=config.model_dump(mode="json"), facts=facts,
        )  # fmt: skip
        session.add(job)
        session.flush()
        session.execute(insert(Candidate), [{"job_id": job.id, **c} for c in candidates])
    seconds = rng.lognormal(-9, 0.2, loss.shape)
    save_tables(store, job.id, _tables(loss, seconds, sizes[open_units].sum(), timed=timed))
    add_event(store, job.id, "state", state=DONE, error=None)
    log(store, job.id, "driver 1 begins")
    add_event(store, job.id, "stage", label="finalists", steps=432, seconds=60.0)
    rows = list(_measured(model, quality, chunks, candidates, rng))
    _insert(store, rows)
    return job.id, len(rows)


def _candidates(
    found: Layout,
    names: list[str],
    open_units: np.ndarray,
    costs: np.ndarray,
    loss: np.ndarray,
    rng: np.random.Generator,
) -> Iterator[dict[str, Any]]:
    """Uniform maps, three random ones, and mixes; the first are measured on held-out text."""
    rows = np.arange(len(costs))
    numel = sum(
        unit.numel for unit, is_open in zip(found.units, open_units, strict=True) if is_open
    )
    for point in range(1, CANDIDATES + 1):
        control = "uniform" if point <= len(MENU) else "random" if point <= len(MENU) + 3 else None
        middle = rng.uniform(0, len(MENU) - 1)
        drawn = np.clip(np.rint(rng.normal(middle, 0.7, len(rows))), 0, len(MENU) - 1)
        chosen = np.full(len(rows), point - 1) if control == "uniform" else drawn.astype(int)
        chosen = np.where(open_units, chosen, names.index(PINNED))
        schemes = [names[column] for column in chosen]
        pairs = [(Scheme(name).weight, Scheme(name).activation) for name in schemes]
        nbytes = costs[rows, chosen]
        yield {
            "point": point, "map_hash": map_hash(found, pairs), "schemes": schemes,
            "origin": f"uniform {schemes[-1]}" if control == "uniform" else control or "fisher",
            "control": control, "weight_bytes": int(nbytes.sum()) + 2 * found.other_numel,
            "average_bits": 8 * int(nbytes[open_units].sum()) / numel,
            "predicted_kl": float(loss[rows, chosen].sum()),
            "certificate": None if control else {"bound": 0.0, "gap": 0.0},
            "finalist": point <= FINALISTS, "failure": None,
        }  # fmt: skip


def _times(maps: list[str], rng: np.random.Generator) -> dict[str, Any]:
    took = {
        name: {"prefill": float(rng.uniform(0.4, 0.9)), "decode": float(rng.uniform(4e-3, 9e-3))}
        for name in maps
    }
    workload = {"batch": 1, "context": 4096, "prompt": 512, "generated": 128, "tensor_parallel": 1}
    return {
        "memory": {"workload": {"batch": 1, "context": 4096}, "activation_bytes": 10**7},
        "times": {
            "source": "measured", "device": "a CPU", "engine": "llama.cpp", "kernels": "1",
            "threads": 2, "workload": workload, "overhead_s": {"prefill": 0.01, "decode": 1e-3},
            "errors": {"prefill": 0.02, "decode": 0.03}, "noisy_cells": 0, "failed_cells": [],
            "maps": {
                name: {"predicted": own, "measured": own, "fitted": False, "joules": {}}
                for name, own in took.items()
            },
        },
    }  # fmt: skip


def _tables(loss: np.ndarray, seconds: np.ndarray, numel: int, *, timed: bool) -> dict[str, Any]:
    phases = {
        phase: {"seconds": (factor * seconds).tolist(), "overhead_s": 1e-3, "error": 0.02}
        for phase, factor in (("prefill", 100.0), ("decode", 1.0))
    }
    return {
        "estimator": "fisher", "loss": loss.tolist(), "other_bytes": 70_000, "numel": int(numel),
        "phases": phases if timed else {},
    }  # fmt: skip


def _measured(
    model: Model,
    quality: QualityKey,
    chunks: dict[str, list[str]],
    candidates: list[dict[str, Any]],
    rng: np.random.Generator,
) -> Iterator[dict[str, Any]]:
    reference = {"map_hash": reference_hash(model.weights_hash), "average_bits": 24.0}
    for role in ("search", "heldout"):
        chosen = [c for c in candidates if role == "search" or c["finalist"]]
        for candidate in [*chosen, reference]:
            kl = 4.0 ** (3.0 - candidate["average_bits"])
            for chunk in chunks[role]:
                own = kl * rng.lognormal(0, 0.2)
                yield _row(model, quality, candidate["map_hash"], chunk, own)


def _refined(model: Model, count: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Maps on a chunk each, as a refinement measures them."""
    quality = QualityKey(model.weights_hash, "rtn", "float32")
    for number in range(count):
        own = rng.lognormal(-2, 0.5)
        yield _row(model, quality, key_of("refined", number), key_of("search", 0, number % 8), own)


def _row(model: Model, quality: QualityKey, name: str, chunk: str, kl: float) -> dict[str, Any]:
    return {
        "key": quality.of(name, chunk), "weights_hash": model.weights_hash, "map_hash": name,
        "chunk_hash": chunk, "quantizer": quality.quantizer, "dtype": quality.dtype,
        "kl_sum": TOKENS * kl, "nll_sum": TOKENS * (2.9 + kl), "tokens": TOKENS, "seconds": 0.5,
    }  # fmt: skip


def _insert(store: Store, rows: Iterable[dict[str, Any]]) -> None:
    """Insert what isn't there yet: jobs of a model share their uniform maps."""
    wanted = {row["key"]: row for row in rows}
    there = known_keys(store, Measurement, [*wanted])
    pending = [row for key, row in wanted.items() if key not in there]
    for start in range(0, len(pending), BATCH):
        with store.session() as session:
            session.execute(insert(Measurement), pending[start : start + BATCH])
