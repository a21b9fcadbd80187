"""A checkpoint folder as transformers lays it out: tensors in safetensors files, and what lies beside.

Tensors come one at a time and go out a file at a time: a model is never in memory as a whole.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.file_names import Place, Places, places_in, places_of
from quantization.checkpoints import Checkpoint, load_config, load_tokenizer, readable
from quantization.errors import ModelError
from quantization.weights import skeleton

FILE_BYTES = 4 * 10**9
BESIDE = ("*.py", "generation_config.json")
"""What a model's own code and its way of ending need."""
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
OURS = ("torch_dtype", "quantization_config", "quantization")
"""Of a model's configuration, what an export says itself or leaves out."""


def write_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights, configuration and tokenizer.

    Args:
        folder: exists, and is empty.
        checkpoint: whose configuration and tokenizer it gets.
        tensors: by name; each is let go of once its file is full.
        config: what its configuration says otherwise.
        metadata: of each file of tensors.

    Raises:
        OSError: the disk refuses.
    """
    _write_tensors(folder, tensors, {"format": "pt", **(metadata or {})})
    described = load_config(checkpoint)
    for name, value in config.items():
        setattr(described, name, value)
    with readable(str(folder)):
        described.save_pretrained(folder)
        _add_older_names(folder / CONFIG, described, Path(checkpoint.folder, CONFIG))
        load_tokenizer(checkpoint).save_pretrained(folder)
    for pattern in BESIDE:
        for file in Path(checkpoint.folder).glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _add_older_names(file: Path, described: Any, original: Path) -> None:
    """What runtimes read that don't ask transformers, and its release 5 has renamed.

    Args:
        file: the configuration that it has written.
        described: the same in memory.
        original: the model's own, which may not be there.
    """
    written = json.loads(file.read_text())
    older = json.loads(original.read_text()) if original.exists() else {}
    aliases = getattr(described, "attribute_map", {}).items()
    older |= {old: written[new] for old, new in aliases if new in written}
    if "rope_theta" in (rope := written.get("rope_parameters") or {}):
        older["rope_theta"] = rope["rope_theta"]
    kept = {name: value for name, value in older.items() if name not in OURS}
    file.write_text(json.dumps({**kept, **written}, indent=2, sort_keys=True) + "\n")


def assembled(
    folder: Path | str,
    dtype: torch.dtype,
    value_of: Callable[[str, Mapping[str, Tensor]], Tensor],
    *,
    is_plain: Callable[[Tensor], bool] = lambda _: True,
    places: Callable[[nn.Module], Places] = places_of,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of a folder, each parameter made from the folder's tensors.

    Args:
        folder: as `write_checkpoint` leaves it.
        dtype: of the skeleton.
        value_of: makes a matrix that files call so, of which the folder has no plain tensor.
        is_plain: whether a tensor that is called like a matrix is its values.
        places: which matrices of the files make up each parameter.
        trust_remote_code: run the folder's own code.

    Raises:
        ModelError: a parameter of another shape than the model's.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    module = skeleton(Checkpoint(str(folder), str(folder), "", None, trust_remote_code), dtype)
    known = places(module)

    def matrix(name: str) -> Tensor:
        plain = tensors.get(name)
        is_value = plain is not None and is_plain(plain)
        return plain.to(dtype) if plain is not None and is_value else value_of(name, tensors)

    for name, parameter in list(module.named_parameters()):
        value = _whole([(place, matrix(place.name)) for place in places_in(known, name)], parameter)
        if value.shape != parameter.shape:
            raise ModelError(
                f"{name} is {tuple(value.shape)} in '{folder}', and the model's configuration makes "
                f"it {tuple(parameter.shape)}"
            )
        _place(module, parameter, nn.Parameter(value, requires_grad=False))
    for name, buffer in module.named_buffers():
        (place,) = places_in(known, name)
        if place.name in tensors:
            buffer.copy_(tensors[place.name])
    return module.eval()


def _whole(parts: Sequence[tuple[Place, Tensor]], parameter: Tensor) -> Tensor:
    """A parameter of the matrices that files hold of it."""
    (first, value), *more = parts
    if not (more or first.rows):
        return value
    whole = torch.empty(parameter.shape, dtype=value.dtype)
    for place, part in parts:
        place.of(whole).copy_(part)
    return whole


def _place(module: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """In every place that holds the old one: tied parameters are held twice."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is old:
                owner._parameters[name] = new


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors of a folder's safetensors files."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 -- not a mapping
                tensor = opened.get_tensor(name)
                total += tensor.numel() * tensor.element_size()
    return total


def _write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str]
) -> None:
    """Files of some gigabytes; with more than one, an index says what is where."""
    parts: list[list[str]] = []
    total = size = 0
    waiting: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(waiting, folder / _name(len(parts) + 1, 0), metadata=metadata)
        parts.append(list(waiting))
        waiting.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if waiting and size + nbytes > FILE_BYTES:
            flush()
            size = 0
        waiting[name] = tensor.contiguous()
        size, total = size + nbytes, total + nbytes
    flush()
    if len(parts) == 1:
        (folder / _name(1, 0)).rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        (folder / _name(number, 0)).rename(folder / _name(number, len(parts)))
        places |= dict.fromkeys(names, _name(number, len(parts)))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"
