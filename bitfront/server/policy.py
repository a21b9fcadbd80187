"""What a server runs for others: none of their code, no file outside its roots, and in bounds."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bitfront.config import AUTO, DEMO, ConfigError, JobConfig, config_of
from evaluation.texts import DEFAULT_SOURCE

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[\w./-]+\.gguf)?")
DATA_SET = re.compile(r"datasets:([A-Za-z0-9][\w.-]*/[\w.-]+)(:[\w .\[\]%-]*)*")
"""With its owner: bare names are also those of readers that look for files where they stand."""
REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,63}")
SAMPLER = re.compile(r"(refine|evolve|surrogate|optuna:\w+)")
MOST = {"budgets": 64, "schemes": 64, "chunks": 4096, "length": 32768, "measurements": 100_000,
        "random_controls": 100, "interactions": 200, "estimators": 32, "patterns": 256,
        "depth": 12, "characters": 4096}  # fmt: skip


def job_of(body: dict[str, Any], roots: Sequence[Path]) -> tuple[JobConfig, dict[str, Any]]:
    """A submitted job's configuration, and what its driver is started with.

    Args:
        body: the fields of a job's YAML, with `model`, and `workers` beside them.
        roots: folders that models and texts may lie in.

    Raises:
        ConfigError: it isn't a job, or not one for a server; `problems` says where.
    """
    _check_words(body)
    given = dict(body)
    model, launch = given.pop("model", None), given.pop("workers", None)
    if not isinstance(model, str) or not model:
        raise _problem(["model"], "a hub id, `demo`, or a path in one of the server's folders")
    given["menu"] = _menu(given["menu"]) if "menu" in given else None
    if given["menu"] is None:
        del given["menu"]
    config = config_of(model, given)
    _check_bounds(config)
    _check_code(config)
    _check_names(config)
    _check_revision(config.revision)
    for loc, source in _sources(config):
        _check_source(loc, source, roots)
    return config, _launch(launch)


def check_again(config: dict[str, Any], roots: Sequence[Path]) -> None:
    """A job that came by another way: a shell may search what a server doesn't run.

    Raises:
        ConfigError: it isn't for a server.
    """
    job_of({name: value for name, value in config.items() if value is not None}, roots)


def _menu(menu: Any) -> Any:
    if isinstance(menu, list):
        if not all(isinstance(name, str) for name in menu) or not menu:
            raise _problem(["menu"], "a list of names of schemes, such as [int4-g64, bf16]")
        return {"schemes": menu, "pinned": {"embedding": "bf16", "head": "bf16"}}
    if isinstance(menu, str) and menu.endswith((".yaml", ".yml")):  # names a file
        raise _problem(["menu"], "a shipped menu's name, a list of schemes, or the menu's fields")
    return menu


def _check_code(config: JobConfig) -> None:
    if config.trust_remote_code:
        raise _problem(
            ["trust_remote_code"],
            "a server runs no code of models; search this one with `bitfront search` on a machine "
            "of your own, with the same --store",
        )
    if not SAMPLER.fullmatch(config.refinement.strategy):
        raise _problem(
            ["refinement", "strategy"],
            "refine, evolve, surrogate, or optuna:SAMPLER with a sampler of Optuna's own",
        )


def _check_names(config: JobConfig) -> None:
    """Names that no registry has: known now, not when a driver starts.

    Raises:
        UnknownNameError: with the nearest names.
    """
    from bitfront.serving import engine_of  # torch
    from cost_models.devices import LOCAL, load_device
    from evaluation.arithmetic import choose_dtype
    from quantization.formats import FORMATS
    from quantization.quantizers import QUANTIZERS
    from quantization.schemes import Scheme
    from quantization.transforms import TRANSFORMS
    from sensitivity import ESTIMATORS

    menu = config.menu
    names = [
        *menu.schemes,
        *menu.cache,
        *menu.pinned.values(),
        *(n for ns in menu.forbidden.values() for n in ns),
    ]
    for name in names:
        FORMATS[Scheme.parse(name).weight]
    QUANTIZERS[config.quantizer]
    for estimator in config.estimators:
        if estimator != AUTO:
            ESTIMATORS[estimator]
    choose_dtype(config.dtype)
    if config.transform:
        TRANSFORMS[config.transform]
    if config.serving.device != LOCAL:
        load_device(config.serving.device)
    engine_of(config.serving)


def _sources(config: JobConfig) -> Iterator[tuple[list[str], str]]:
    """Everything in a job that may name a file."""
    yield ["model"], config.model
    if config.imatrix is not None:
        yield ["imatrix"], config.imatrix
    for role, text in config.texts:
        yield ["texts", role, "source"], text.source


def _check_revision(revision: str | None) -> None:
    """A branch, a tag or a commit: the hub's cache makes files of that name."""
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise _problem(["revision"], "a branch, a tag or a commit of the hub, of 64 characters")


def _check_source(loc: list[str], source: str, roots: Sequence[Path]) -> None:
    """A name that the hub or we know, or a path that really lies in a root."""
    named = {
        "model": source == DEMO or _is_hub_id(source),
        "texts": source == DEFAULT_SOURCE or _is_data_set(source),
    }
    if named.get(loc[0]):
        return
    path = Path(source)
    if path.is_absolute():
        try:
            real = path.resolve()
            allowed = any(real.is_relative_to(root) for root in roots)
            there = allowed and real.exists()
        except (OSError, RuntimeError) as error:
            raise _problem(loc, f"can't be read ({error})") from error
        if there:
            return
        if allowed:
            raise _problem(loc, f"there is no '{source}' on the server")
    folders = ", ".join(map(str, roots)) or "none: start it with --allow FOLDER"
    kinds = {"model": "a hub id, `demo`, or ", "texts": "`python-docs`, `datasets:OWNER/NAME`, or "}
    raise _problem(
        loc,
        f"'{source[:80]}' is not {kinds.get(loc[0], '')}a whole path in a folder that the server "
        f"allows ({folders})",
    )


def _is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and ".." not in name


def _is_data_set(name: str) -> bool:
    found = DATA_SET.fullmatch(name)
    return found is not None and ".." not in name and not Path(found[1]).exists()


def _check_bounds(config: JobConfig) -> None:
    found = [
        (["budgets"], len(config.budgets), MOST["budgets"]),
        (["budgets_bytes"], len(config.budgets_bytes), MOST["budgets"]),
        (["menu", "schemes"], len(config.menu.schemes), MOST["schemes"]),
        (["menu", "pinned"], len(config.menu.pinned), MOST["patterns"]),
        (["menu", "forbidden"], len(config.menu.forbidden), MOST["patterns"]),
        (["estimators"], len(config.estimators), MOST["estimators"]),
        (["random_controls"], config.random_controls, MOST["random_controls"]),
        (["interactions"], config.interactions, MOST["interactions"]),
        (["refinement", "measurements"], config.refinement.measurements, MOST["measurements"]),
    ]
    for role, text in config.texts:
        found.append((["texts", role, "chunks"], text.chunks, MOST["chunks"]))
        found.append((["texts", role, "length"], text.length, MOST["length"]))
    for loc, value, most in found:
        if value > most:
            raise _problem(loc, f"{value} is more than the {most} that a server takes")


def _launch(workers: Any) -> dict[str, Any]:
    """What a driver is started with: `Needs` of the workers."""
    from pydantic import ValidationError

    from bitfront.server.schema import Workers

    if workers is None:
        return {}
    try:
        return Workers.model_validate(workers).model_dump(exclude_none=True)
    except ValidationError as error:
        problems = [
            {"loc": ["workers", *map(str, found["loc"])], "msg": found["msg"]}
            for found in error.errors()
        ]
        said = "; ".join(f"{'.'.join(p['loc'])}: {p['msg']}" for p in problems)
        raise ConfigError(f"workers are wrong: {said}", problems) from error


def _check_words(value: Any, depth: int = 0) -> None:
    """Refuse what a database can't keep: NUL, half a surrogate; and what has no end."""
    if depth > MOST["depth"]:
        raise _problem([], f"fields nest deeper than {MOST['depth']}")
    if isinstance(value, str):
        if len(value) > MOST["characters"]:
            raise _problem([], f"a text of more than {MOST['characters']} characters")
        if "\0" in value:
            raise _problem([], "a text with NUL in it")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _problem([], "a text with half a surrogate in it") from error
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_words(key, depth + 1)
            _check_words(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_words(inner, depth + 1)


def _problem(loc: list[str], text: str) -> ConfigError:
    where = ".".join(loc)
    return ConfigError(f"{where or 'the body'}: {text}", [{"loc": loc, "msg": text}])
