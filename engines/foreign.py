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
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml

from engines.file_names import Places, places_of
from engines.neutral_map import FILE_NAME
from quantization.checkpoints import Checkpoint, load_config
from quantization.errors import ExportError, ModelError
from quantization.formats import FORMATS
from quantization.precision_map import PrecisionMap
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import KEYS, VALUES, Layout
from quantization.weights import skeleton

GROUP = 64
"""Of maps that only say bits."""
LLAMA = "llama.cpp"
PREFIX = "gguf-"
PLAIN_TYPES = {"f32": FULL_PRECISION, "f16": FULL_PRECISION, "bf16": FULL_PRECISION}
READERS = {
    "compressed-tensors": "engines.compressed_config",
    "gptq": "engines.gptq",
    "torchao": "engines.torchao",
}
"""A configuration's `quant_method`, which is the engine's name, to the module that reads it."""
KNOWN = f"{', '.join(READERS)} and MLX"
YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Foreign:
    """What a file says.

    Args:
        formats: the scheme of each site that it speaks of, by name.
        engine: whose map it is, where only one loads such files.
    """

    formats: dict[str, str]
    engine: str | None = None

    @property
    def caches(self) -> dict[str, str]:
        """Of KV caches alone, where any is quantized."""
        found = {n: f for n, f in self.formats.items() if n.rpartition(".")[2] in (KEYS, VALUES)}
        return found if {*found.values()} - {FULL_PRECISION} else {}


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
    if path.is_dir():  # an export of ours says more than its configuration
        own = path / FILE_NAME
        path = own if own.exists() else path / "config.json"
    if path.suffix == ".gguf":
        return _of_gguf(path, checkpoint, layout)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"can't read the map '{path}': {told}") from error
    try:
        document = yaml.safe_load(text) if path.suffix in YAML else json.loads(text)
    except ValueError:
        return _of_types(path, text, checkpoint, layout)
    except yaml.YAMLError as error:
        raise ModelError(f"'{path}' is no map: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ModelError(f"'{path}' is no map: it holds a {type(document).__name__}")
    if "map_hash" in document:
        return _of_ours(path, PrecisionMap.read(path))
    found = _of_config(path, document, checkpoint, layout) or _of_recipe(document)
    return found or _of_bits(path, document, _names(layout, "linear", "head"))


def _names(layout: Layout, *kinds: str) -> list[str]:
    return [site.name for unit in layout.units if unit.kind in kinds for site in unit.sites]


def _of_ours(path: Path, found: PrecisionMap) -> Foreign:
    if transform := found.provenance.get("transform"):
        raise ModelError(
            f"'{path}' is for the model as {transform} rescaled it; search with that transform, "
            "and export its point"
        )
    names = {u.name: Scheme(u.scheme.weight, u.scheme.activation).name for u in found.units}
    return Foreign({site: names[unit.name] for unit in found.units for site in unit.sites})


def _of_config(
    path: Path, document: Mapping[str, Any], checkpoint: Checkpoint, layout: Layout
) -> Foreign | None:
    """A model's configuration, or the part of it that a tool keeps in a file of its own."""
    config, own = document.get("quantization_config"), document.get("quantization")
    if isinstance(own, dict) and "bits" in own:
        return _of_mlx(own, checkpoint, layout)
    if "dynamic" in document and "bits" in document:
        config = {"quant_method": "gptq", **document}
    if not isinstance(config, dict):
        return None
    method = config.get("quant_method")
    if method not in READERS:
        raise ModelError(f"'{path}' is quantized by '{method}'; maps are read of {KNOWN}")
    head = method != "gptq" or config.get("lm_head")
    places = places_of(skeleton(checkpoint, torch.float32))
    places = {} if method == "torchao" else places  # whose experts stay as they are
    modules = _modules(layout, places, head=bool(head))
    try:
        read: Callable[..., dict[str, str]] = import_module(READERS[method]).formats_of
        formats = _of_sites(read(config, [*chain(*modules.values())]), modules)
        return Foreign(formats | _caches(method, config, layout), method)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        told = " ".join(str(error).split())[:200]
        raise ModelError(f"'{path}' is no configuration of {method}: {told}") from error


def _caches(method: Any, config: Mapping[str, Any], layout: Layout) -> dict[str, str]:
    """Of compressed-tensors, which alone says it in the checkpoint: one format for all of it."""
    if method != "compressed-tensors" or not config.get("kv_cache_scheme"):
        return {}
    from engines.compressed_config import cache_format_of

    if not (names := _names(layout, "cache")):
        raise ExportError(
            "the configuration quantizes the KV cache, and this job leaves it as it is; name one "
            "that chooses its formats (search with --kv-menu) by --job"
        )
    return dict.fromkeys(names, cache_format_of(config))


def _of_mlx(config: Mapping[str, Any], checkpoint: Checkpoint, layout: Layout) -> Foreign:
    """MLX's affine values have free biases, which are zero points in float16 here."""
    from engines.mlx import MLXCheckpoint, formats_of

    places = MLXCheckpoint().places(skeleton(checkpoint, torch.float32))
    modules = _modules(layout, places, head=True, embedding=True)
    found = _of_sites(formats_of(config, [*chain(*modules.values())]), modules)
    return Foreign({name: format.replace("-bf16", "-real") for name, format in found.items()})


def _modules(
    layout: Layout, places: Places, *, head: bool, embedding: bool = False
) -> dict[str, list[str]]:
    """What files call the modules of each site: of packed experts, all of them."""
    kinds = {
        "linear",
        "experts",
        *(["head"] if head else []),
        *(["embedding"] if embedding else []),
    }
    sites = [
        site
        for unit in layout.units
        for site in unit.sites
        if unit.kind in kinds and (unit.kind != "experts" or site.parameter in places)
    ]
    return {
        site.name: [p.module for p in places[site.parameter]]
        if site.parameter in places
        else [site.name]
        for site in sites
    }


def _of_sites(found: Mapping[str, str], modules: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The format of each site, of those of its modules."""
    formats = {}
    for site, names in modules.items():
        several = sorted({found[name] for name in names})
        if len(several) > 1:
            raise ExportError(
                f"the configuration has parts of {site} in {' and '.join(several)}, which are "
                "chosen together here"
            )
        formats[site] = several[0]
    return formats


def _of_recipe(document: Mapping[str, Any]) -> Foreign | None:
    """What tools are told that quantize by themselves."""
    from engines.auto_round import AutoRound
    from engines.llm_compressor import STAGE, LLMCompressor
    from engines.model_optimizer import ModelOptimizer

    if "quant_cfg" in document:
        return Foreign(ModelOptimizer().formats(document))
    if STAGE in document:
        return Foreign(LLMCompressor().formats(document))
    if document and all(isinstance(x, dict) and "bits" in x for x in document.values()):
        return Foreign(AutoRound().formats(document))
    return None


def _of_bits(path: Path, document: Mapping[str, Any], names: Sequence[str]) -> Foreign:
    known = {name: document[name] for name in names if name in document}
    if not known:
        first = next(iter(document), None)
        raise ModelError(
            f"'{path}' names no layer of this model ({first!r} isn't one, {names[0]} is)"
        )
    formats = {}
    for name, value in known.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        format = f"int{value}-g{GROUP}" if whole else value
        if not isinstance(format, str) or format not in FORMATS:
            raise ModelError(f"'{path}' gives {name} {value!r}, which is neither bits nor a format")
        formats[name] = format
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
    """Words of `REGEX=TYPE`, as llama-quantize reads them; lines that begin with `#` are remarks."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    rules = [word.rpartition("=")[::2] for word in " ".join(lines).split()]
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
    from engines.gguf_file import parts_of, tensor_names

    name_of = tensor_names(load_config(checkpoint))
    return {s.name: name_of(parts_of(s)[0][0]) for u in layout.weights for s in u.sites}
