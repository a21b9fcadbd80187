"""Maps that other tools wrote, read as formats of ours: anybody's recipe can be measured.

precision_map.json                      our own
{"model.layers.0…q_proj": 4, …}         bits (groups of 64) or format by linear layer
config.json, quantize_config.json       compressed-tensors, GPTQ with `dynamic`, MLX
model.gguf                              the types of its tensors
lines of REGEX=TYPE                     llama.cpp's tensor types; the first that matches counts
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantization.checkpoints import Checkpoint, load_config
from quantization.errors import ModelError
from quantization.formats import FORMATS
from quantization.precision_map import PrecisionMap
from quantization.schemes import FULL_PRECISION
from quantization.units import Layout

GROUP = 64
"""Of maps that only say bits."""
LLAMA = "llama.cpp"
PREFIX = "gguf-"
PLAIN_TYPES = {"f32": FULL_PRECISION, "f16": FULL_PRECISION, "bf16": FULL_PRECISION}
READERS: dict[str, tuple[str, str, str]] = {
    "compressed-tensors": (
        "engines.compressed_tensors",
        "quantization_config",
        "compressed-tensors",
    ),
    "gptq": ("engines.gptq", "quantization_config", "gptq"),
    "torchao": ("engines.torchao", "quantization_config", "torchao"),
    "mlx": ("engines.mlx", "quantization", "mlx"),
}
"""Kind of configuration: the module whose `formats_of` reads it, its key, and the engine."""


@dataclass(frozen=True)
class Foreign:
    """What a file says.

    Args:
        formats: of each site that it speaks of.
        engine: whose map it is, where only one loads such files.
    """

    formats: dict[str, str]
    engine: str | None = None


def read_map(path: Path, checkpoint: Checkpoint, layout: Layout) -> Foreign:
    """Read a file, or a folder's `config.json`.

    Args:
        path: the file.
        checkpoint: the model that the map is for.
        layout: its units.

    Raises:
        ModelError: what it is, can't be told, or it doesn't fit the model.
        ExportError: it names what no format stands for.
    """
    if path.is_dir():
        path = path / "config.json"
    names = [s.name for u in layout.units for s in u.sites if u.kind in ("linear", "head")]
    if path.suffix == ".gguf":
        return _of_gguf(path, checkpoint, layout)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"can't read the map '{path}': {error}") from error
    try:
        document = json.loads(text)
    except ValueError:
        return _of_types(path, text, checkpoint, layout)
    if not isinstance(document, dict):
        raise ModelError(f"'{path}' is no map: it holds a {type(document).__name__}")
    if "map_hash" in document:
        return _of_ours(PrecisionMap.read(path))
    return _of_config(path, document, names) or _of_bits(path, document, names)


def _of_ours(found: PrecisionMap) -> Foreign:
    return Foreign({site: unit.scheme.weight for unit in found.units for site in unit.sites})


def _of_config(path: Path, document: Mapping[str, Any], names: Sequence[str]) -> Foreign | None:
    """A model's configuration, or the part of it that a tool keeps in a file of its own."""
    from importlib import import_module

    for kind, (module, key, engine) in READERS.items():
        found = document.get(key)
        if kind == "gptq" and found is None and "dynamic" in document:
            found = {"quant_method": "gptq", **document}
        if not isinstance(found, dict) or found.get("quant_method", kind) != kind:
            continue
        if kind != "mlx" or "bits" in found:
            read: Callable[..., dict[str, str]] = import_module(module).formats_of
            return Foreign(read(found, names), engine)
    if "quantization_config" in document:
        method = document["quantization_config"].get("quant_method")
        raise ModelError(
            f"'{path}' is quantized by '{method}'; maps are read of {', '.join(READERS)}"
        )
    return None


def _of_bits(path: Path, document: Mapping[str, Any], names: Sequence[str]) -> Foreign:
    known = {name: document[name] for name in names if name in document}
    if not known:
        raise ModelError(f"'{path}' is no map: it says nothing of {names[0]}")
    formats = {n: x if isinstance(x, str) else f"int{int(x)}-g{GROUP}" for n, x in known.items()}
    for name, format in formats.items():
        if format not in FORMATS:
            raise ModelError(f"'{path}' gives {name} the format '{format}', which there isn't")
    return Foreign(formats)


def _of_gguf(path: Path, checkpoint: Checkpoint, layout: Layout) -> Foreign:
    import gguf

    try:
        tensors = gguf.GGUFReader(path).tensors
    except (OSError, ValueError, IndexError) as error:
        raise ModelError(f"can't read '{path}' as a GGUF file: {error}") from error
    types = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    formats = {}
    for site, name in _gguf_names(checkpoint, layout).items():
        if name in types:
            formats[site] = _format_of(types[name])
    return Foreign(formats, LLAMA)


def _of_types(path: Path, text: str, checkpoint: Checkpoint, layout: Layout) -> Foreign:
    """`REGEX=TYPE` by lines; `#` begins a remark."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    rules = [line.rpartition("=")[::2] for line in lines if line]
    if not rules or not all(pattern and type for pattern, type in rules):
        raise ModelError(f"'{path}' is no map: neither JSON nor lines of REGEX=TYPE")
    formats = {}
    for site, name in _gguf_names(checkpoint, layout).items():
        for pattern, type in rules:
            try:
                found = re.search(pattern, name)
            except re.error as error:
                raise ModelError(f"'{path}': '{pattern}' is no pattern ({error})") from error
            if found:
                formats[site] = _format_of(type)
                break
    return Foreign(formats, LLAMA)


def _format_of(type: str) -> str:
    """Our format of ggml's type."""
    if type.lower() in PLAIN_TYPES:
        return PLAIN_TYPES[type.lower()]
    names = {name.lower(): name for name in FORMATS if name.startswith(PREFIX)}
    found = names.get(f"{PREFIX}{type}".lower())
    if found is None:
        raise ModelError(f"there is no ggml type '{type}'; such as {', '.join(list(names)[:4])}")
    return found


def _gguf_names(checkpoint: Checkpoint, layout: Layout) -> dict[str, str]:
    """Site to the name of its tensor in GGUF files."""
    from engines.gguf_file import tensor_names

    name_of = tensor_names(load_config(checkpoint))
    return {s.name: name_of(s.parameter) for u in layout.units for s in u.stored}
