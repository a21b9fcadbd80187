"""Job configuration: a YAML preset, a user's file over it, command-line flags over both."""

import re
import reprlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantization.errors import BitfrontError
from quantization.registry import LONGEST, Registry, shown

DEMO = "demo"
AUTO = "auto"
"""In the place of an estimator: the best of the model's audit."""
UNPROVEN = ("fisher", "fisher-quantized")
"""What scores where no audit of the model has been: see benchmarks/results."""
MOST_PROBLEMS = 8
"""That an error names; the rest are counted."""
MOST, MOST_BYTES = 2**31 - 1, 2**62
MOST_SECONDS, MOST_JOULES = 1e6, 1e9
MOST_SEED = 2**32 - 1
"""Of NumPy's older generators, which Optuna's samplers use."""

Bits = Annotated[float, Field(gt=0, le=64)]
Bytes = Annotated[int, Field(gt=0, le=MOST_BYTES)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS)]
Joules = Annotated[float, Field(gt=0, le=MOST_JOULES)]

ENGINE_MENUS = {
    "llama.cpp": "gguf",
    **{name: name for name in ("vllm", "compressed-tensors", "torchao", "gptq", "mlx")},
}
"""What an engine's jobs choose from where nothing else is asked for."""


class ConfigError(BitfrontError):
    """A configuration that doesn't say what it should, with the field and what is expected.

    Args:
        text: all in one line.
        problems: the same by field, where it was fields: `loc` is the way to it.
    """

    def __init__(self, text: str, problems: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(text)
        self.problems = list(problems)


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Menu(_Closed):
    """What the search chooses from.

    Args:
        schemes: scheme names, in any order.
        pinned: unit kind (`embedding`, `head`, `experts`, `linear`) or a pattern of site names
            (`*.layers.0.*`) to the one scheme that those units get.
        forbidden: kinds or patterns to schemes of the menu that those units never get.
        most_formats: how many distinct weight formats a map may use; bf16 isn't counted.
        left_alone: the share of the units to decide that must stay in full precision.
        cache: formats of the KV cache's keys and values to choose from; none leaves it as it is.
    """

    schemes: tuple[str, ...] = Field(min_length=1)
    cache: tuple[str, ...] = ()
    pinned: dict[str, str] = Field(default_factory=dict)
    forbidden: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    most_formats: Count | None = None
    left_alone: float = Field(default=0.0, ge=0, le=1)

    @property
    def silent(self) -> set[str]:
        """The rules that say nothing; a job's key leaves them out, as when they didn't exist."""
        rules = ("forbidden", "most_formats", "left_alone", "cache")
        return {n for n in rules if not getattr(self, n)}


class TextConfig(_Closed):
    """A text: `python-docs`, a file, or `datasets:ID:CONFIG:SPLIT:COLUMN`; chunks x length."""

    source: str
    chunks: Count
    length: int = Field(ge=2, le=MOST)


class HeldoutConfig(TextConfig):
    """Held-out text: at least two chunks, whose spread gives the confidence interval."""

    chunks: int = Field(ge=2, le=MOST)


class Texts(_Closed):
    """Three texts for three purposes; a source named twice is divided between them."""

    calibration: TextConfig
    search: TextConfig
    heldout: HeldoutConfig


class RefinementConfig(_Closed):
    """How long maps are refined by measurement, and how.

    Args:
        strategy: `refine` (whose measurements have slopes, and take four times as long), `evolve`,
            `surrogate`, or `optuna:SAMPLER`, such as `optuna:NSGAIISampler` or `optuna:module:Class`.
        measurements: at most so many, a map on a chunk each; 0 for none.
        minutes: and at most so long; what is found then depends on the machine's speed.
    """

    strategy: str = "refine"
    measurements: int = Field(default=0, ge=0, le=MOST)
    minutes: float | None = Field(default=None, gt=0, le=MOST_SECONDS)


SINCE = ("generated", "tensor_parallel", "max_decode_j", "max_prefill_j")
"""Fields of `ServingConfig` that are younger than it."""


class ServingConfig(_Closed):
    """Where a map is to be served, and what it may take there.

    Args:
        engine: whose rules, bytes and times count; None for bytes of our own packed tensors.
        device: `local`, or one of the catalogue (`bitfront devices`), whose times are analytical.
        threads: of the CPU that serve; by default all of this machine's cores.
        batch: sequences side by side.
        context: tokens in the KV cache of each when a token is generated.
        prompt: tokens of a prompt.
        generated: tokens of an answer.
        tensor_parallel: devices that share every layer; limits on memory are each one's.
        max_memory_bytes: of weights, KV cache and activations together.
        max_decode_s: of a generated token.
        max_prefill_s: of a prompt.
        max_decode_j: joules of a generated token of each sequence, all devices together.
        max_prefill_j: of a prompt.
    """

    engine: str | None = None
    device: str = "local"
    threads: Count | None = None
    batch: Count = 1
    context: Count = 4096
    prompt: Count = 512
    generated: Count = 128
    tensor_parallel: Count = 1
    max_memory_bytes: Bytes | None = None
    max_decode_s: Seconds | None = None
    max_prefill_s: Seconds | None = None
    max_decode_j: Joules | None = None
    max_prefill_j: Joules | None = None

    @property
    def silent(self) -> bool | set[str]:
        """What of it jobs had no word for once, and doesn't tell them apart: all, or some fields."""
        usual = type(self)()
        if self == usual:
            return True
        return {name for name in SINCE if getattr(self, name) == getattr(usual, name)}


class JobConfig(_Closed):
    """Everything that determines a job's result.

    Args:
        budgets: average bits over the quantizable weights, scales and padding included; by
            default those of the menu's uniform maps and the middles between them.
        budgets_bytes: upper bounds on the model's weight bytes, beside `budgets`.
        dtype: arithmetic of the measurements: auto, bfloat16 or float32.
        imatrix: a llama.cpp importance matrix, instead of the calibration text's.
        bank: what workers keep of each scheme: values (fast), packed bytes (small), or auto, which
            takes packed bytes where the values would fill more than half of the memory.
        interactions: units whose pairs are measured where sums of losses predict badly; 0 for none.
        serving: engine, device, workload, and limits on memory, latency and energy.
        transform: what the whole model is put through before it is quantized: awq, smoothquant.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    menu: Menu
    quantizer: str
    imatrix: str | None = None
    bank: Literal["auto", "values", "packed"] = "auto"
    estimators: tuple[str, ...] = Field(min_length=1)
    texts: Texts
    budgets: tuple[Bits, ...] = ()
    budgets_bytes: tuple[Bytes, ...] = ()
    random_controls: int = Field(ge=0, le=MOST)
    interactions: int = Field(default=0, ge=0, le=MOST)
    refinement: RefinementConfig = RefinementConfig()
    serving: ServingConfig = ServingConfig()
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    dtype: str = "auto"
    transform: str | None = None


def load_config(model: str, file: Path | None, overrides: dict[str, Any]) -> JobConfig:
    """The configuration of a job.

    Args:
        model: what the user named; `demo` has a preset of its own.
        file: a YAML file whose fields replace the preset's.
        overrides: fields given on the command line; dots go into nested ones
            (`texts.search.source`), None is skipped.

    Raises:
        ConfigError: an unknown field or a wrong value, with the file's name.
    """
    return config_of(model, _read_yaml(file) if file else {}, overrides, file)


def config_of(
    model: str,
    given: dict[str, Any],
    overrides: dict[str, Any] | None = None,
    file: Path | None = None,
) -> JobConfig:
    """The configuration of a job from fields that replace the preset's; see `load_config`.

    Raises:
        ConfigError: an unknown field or a wrong value, with the places in `problems`.
    """
    data = _preset("jobs", DEMO if model == DEMO else "default")
    overrides = dict(overrides or {})
    cache = overrides.pop("menu.cache", None)
    usual = data["menu"]
    data = _merge(data, given)
    for path, value in overrides.items():
        data = data if value is None else _merge(data, _nested(path, value))
    wanted = data.get("serving")
    engine = wanted.get("engine") if isinstance(wanted, dict) else None
    own = given.get("menu")
    asked = (
        overrides.get("menu")
        or isinstance(own, str)
        or (isinstance(own, dict) and "schemes" in own)
    )
    if isinstance(engine, str) and engine in ENGINE_MENUS and not asked:
        base = _menu(ENGINE_MENUS[engine])
        data["menu"] = _merge(base, own) if isinstance(own, dict) else base
    elif isinstance(own, dict) and not asked:  # rules alone are for the preset's schemes
        data["menu"] = _merge(_menu(usual), own)
    if isinstance(data.get("menu"), str):
        data["menu"] = _menu(data["menu"])
    if cache is not None and isinstance(data["menu"], dict):
        data["menu"] = {**data["menu"], "cache": cache}
    try:
        return JobConfig.model_validate({**_absolute(data), "model": _absolute_path(model)})
    except ValidationError as error:
        raise ConfigError(_explain(error, file), _problems(error)) from error


def _menu(name: str) -> dict[str, Any]:
    """A shipped menu, a YAML file's, or a comma-separated list of schemes."""
    if name.endswith((".yaml", ".yml")):
        return _read_yaml(Path(name))
    known = _shipped_menus()
    if name in known:
        return _preset("menus", name)
    if "," not in name:
        _one_format(name, known)
    schemes = [part.strip() for part in name.split(",") if part.strip()]
    return {"schemes": schemes, "pinned": {"embedding": "bf16", "head": "bf16"}}


@cache
def _shipped_menus() -> tuple[str, ...]:
    menus = files("configs").joinpath("menus").iterdir()
    return tuple(entry.name.removesuffix(".yaml") for entry in menus)


def _one_format(name: str, menus: Sequence[str]) -> None:
    """Raise `UnknownNameError` where a lone name is neither a format nor a menu."""
    from quantization.formats import FORMATS  # torch

    known: Registry[None] = Registry("menu or format")
    for entry in dict.fromkeys([*menus, *(format.split("@")[0] for format in FORMATS)]):
        known.add(entry, None)
    known[re.split(r"[/@]", name)[0]]


@cache  # nobody changes them: `_merge` copies
def _preset(kind: str, name: str) -> dict[str, Any]:
    text = files("configs").joinpath(kind, f"{name}.yaml").read_text()
    data: dict[str, Any] = yaml.safe_load(text)
    return data


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  # a safe one
    except (OSError, yaml.YAMLError, ValueError) as error:  # of names, characters and UTF-8
        raise ConfigError(f"can't read '{shown(path)}': {_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"can't read '{shown(path)}': its fields nest too deeply") from error
    if not isinstance(data, dict):
        raise ConfigError(f"'{shown(path)}' should hold fields such as 'menu: int-sym-g32'")
    return data


def _line(error: Exception) -> str:
    """What a library says, in one line."""
    said = " ".join(str(error).split())
    return said if said.isprintable() else said.encode("unicode_escape").decode()


class _Loader(yaml.SafeLoader):
    """Says where a scalar has no value, such as `2001-99-99`: PyYAML's readers raise what they like."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"this is no {kind} ({error})", node.start_mark
            ) from error


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _nested(path: str, value: Any) -> dict[str, Any]:
    head, _, tail = path.partition(".")
    return {head: _nested(tail, value) if tail else value}


def _absolute(data: dict[str, Any]) -> dict[str, Any]:
    """Files by their whole path: one name a file, and one that holds in other folders."""
    if isinstance(data.get("imatrix"), str):
        data = {**data, "imatrix": _absolute_path(data["imatrix"])}
    texts = data.get("texts")
    if not isinstance(texts, dict):
        return data
    found = {
        role: {**text, "source": _absolute_path(text["source"])}
        if isinstance(text, dict) and isinstance(text.get("source"), str)
        else text
        for role, text in texts.items()
    }
    return {**data, "texts": found}


def _absolute_path(name: str) -> str:
    """What it names where that is there; a name that can't be one of a file stays as it is."""
    if name == DEMO:
        return name
    try:
        path = Path(name).expanduser()
        return str(path.resolve()) if path.exists() else name
    except (OSError, RuntimeError):  # too long, not ours to see, a loop, nobody's home
        return name


def _problems(error: ValidationError) -> list[dict[str, Any]]:
    return [
        {"loc": [shown(part) for part in found["loc"]], "msg": found["msg"]}
        for found in error.errors()[:MOST_PROBLEMS]
    ]


def _explain(error: ValidationError, file: Path | None) -> str:
    found = error.errors()
    problems = "; ".join(
        f"{'.'.join(map(shown, problem['loc']))}: {problem['msg']}"
        + (
            f" (got {shown(_Short().repr(problem['input']))})"
            if problem["type"] != "missing"
            else ""
        )
        for problem in found[:MOST_PROBLEMS]
    )
    if len(found) > MOST_PROBLEMS:
        problems += f"; and {len(found) - MOST_PROBLEMS} more"
    return f"the job's configuration{f' (with {file})' if file else ''} is wrong: {problems}"


class _Short(reprlib.Repr):
    """Values in errors: in full where that is short, for they may be as long as their file."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, LONGEST, LONGEST

    def repr_int(self, x: int, level: int) -> str:
        """Hexadecimal ones may have more digits than Python is willing to print."""
        return repr(x) if x.bit_length() < LONGEST else f"a number of {x.bit_length()} bits"
