"""What `profile` does: time a model's products on this machine, and print them."""

import os
from typing import Any

import numpy as np
from rich.table import Table

from bitfront import rules
from bitfront.config import DEMO, ConfigError, JobConfig
from bitfront.console import errors, print_json, print_table
from bitfront.demo import demo_model
from bitfront.profiling import Profile, Subject, profile
from bitfront.progress import Lines, RichProgress
from bitfront.searching import READING, open_pool
from bitfront.serving import engine_of, subject_of
from bitfront.sizes import show_seconds
from cost_models.devices import LOCAL
from cost_models.memory import PHASES
from engines import load_timed
from quantization.adapter import describe
from quantization.checkpoints import load_config, resolve
from sensitivity import menu
from store.database import Store
from workers.session import SessionSpec


def run(config: JobConfig, store: Store, address: str, as_json: bool) -> None:
    """Profile and print.

    Raises:
        ConfigError: a device that isn't this machine.
    """
    if config.serving.device != LOCAL:
        raise ConfigError(
            f"only this machine can be profiled, not '{config.serving.device}'; run this command there"
        )
    with errors.status(READING):
        subject, spec = prepared(config)
    with (
        (RichProgress if errors.is_terminal else Lines)(errors) as progress,
        open_pool(spec, address, 1) as pool,
    ):
        found = profile(subject, store, pool, progress)
    if as_json:
        print_json(_document(found))
    else:
        print_table(_table(found))
    for line in _remarks(found):
        errors.print(line, highlight=False)


def prepared(config: JobConfig) -> tuple[Subject, SessionSpec]:
    """What a configuration's model is timed with on this machine, and what a worker must know of it.

    Raises:
        BitfrontError: a model, engine or format that isn't there.
    """
    engine_of(config.serving)
    engine = load_timed(config.serving.engine or "")
    source = demo_model() if config.model == DEMO else config.model
    checkpoint = resolve(source, config.revision, config.trust_remote_code)
    engine.check(load_config(checkpoint))
    layout = describe(checkpoint) if engine.fuses else describe(checkpoint).split()
    choices = rules.choices(layout, config.menu, engine)
    columns = tuple(menu(choices))
    offered = np.array([[scheme in row for scheme in columns] for row in choices])
    subject = subject_of(config.serving, engine, layout, columns, offered)
    spec = SessionSpec(
        checkpoint, layout, "rtn", tuple(tuple(s.name for s in row) for row in choices), "float32",
        subject.place.threads, os.environ.get("BITFRONT_CACHE"), np.zeros((1, 2), np.int64), "",
    )  # fmt: skip
    return subject, spec


def _document(found: Profile) -> dict[str, Any]:
    subject = found.subject
    return {
        "place": vars(subject.place),
        "workload": vars(subject.workload),
        "cells": [
            {
                "shape": list(cell.shape), "kernel": cell.kernel, "batch": cell.batch,
                "median_s": time.median_s, "spread_s": time.spread_s, "failure": time.failure,
            }
            for cell, time in found.cells.items()
        ],
        "fits": {
            phase: {
                "gains": {kernel: fit.gain(kernel) for kernel in fit.kernels},
                "overhead_s": fit.overhead_s, "error": fit.error, "maps": fit.runs,
            }
            for phase, fit in found.fits.items()
        },
    }  # fmt: skip


def _table(found: Profile) -> Table:
    table = Table(
        "weight", "kernel", "rows of inputs", "time", "spread", "Gop/s",
        title=f"{found.subject.place.engine} on {found.subject.place.device}, "
        f"{found.subject.place.threads} threads",
    )  # fmt: skip
    for cell, time in found.cells.items():
        shape = f"{cell.shape[0]}x{cell.shape[1]}"
        if time.median_s is None:
            table.add_row(shape, cell.kernel, str(cell.batch), "", "", time.failure or "")
            continue
        speed = 2 * cell.shape[0] * cell.shape[1] * cell.batch / time.median_s / 1e9
        table.add_row(
            shape, cell.kernel, str(cell.batch), show_seconds(time.median_s),
            f"{(time.spread_s or 0) / time.median_s:.1%}", f"{speed:.1f}",
        )  # fmt: skip
    return table


def _remarks(found: Profile) -> list[str]:
    lines = [
        f"{phase}: whole maps are predicted within {fit.error:.1%} (one standard deviation over "
        f"{fit.runs} maps); {show_seconds(max(fit.overhead_s, 0.0))} is beside the products."
        for phase in PHASES
        for fit in (found.fits[phase],)
        if fit.error is not None
    ]
    counter, why = found.subject.engine.counter()
    lines.append(f"Energy is measured with whole maps: {why}." if counter else f"No energy: {why}.")
    if found.noisy:
        lines.append(
            f"{len(found.noisy)} products have a spread above 15 %: something else runs here."
        )
    return lines
