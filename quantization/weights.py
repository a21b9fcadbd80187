"""A checkpoint's weights, each read from its file when it is asked for.

Quantizing a model then needs the memory of its largest layers, not of all. That works where the
files hold the parameters as the model has them; where transformers renames or merges them on the
way in (experts that are stored one by one), the model is loaded as a whole instead.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantization.checkpoints import Checkpoint, load_config, load_model

SCALED = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "I8", "U8")
"""Types of tensors that mean nothing without their scales."""


class Weights(Mapping[str, Tensor]):
    """Parameters and persistent buffers by their first name in the state dict, in float32.

    Args:
        readers: how each is read.
    """

    def __init__(self, readers: Mapping[str, Any]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._readers[name]()
        return tensor.float() if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def open_weights(checkpoint: Checkpoint) -> Weights:
    """The weights of a checkpoint; reads none of them if its files hold them as the model does."""
    module = skeleton(checkpoint, torch.float32)
    wanted = {name: tuple(tensor.shape) for name, tensor in _stored(module).items()}
    files = _files(Path(checkpoint.folder))
    same = all(name in files and files[name].shape == shape for name, shape in wanted.items())
    if same and not _converted(module):
        return Weights({name: partial(_read, files[name].path, name) for name in wanted})
    loaded = _stored(load_model(checkpoint, torch.float32))
    return Weights({name: partial(loaded.__getitem__, name) for name in loaded})


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model with its parameters on the meta device and its computed buffers real."""
    from transformers import AutoModelForCausalLM

    config = load_config(checkpoint)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=checkpoint.trust_remote_code
        )
    model.tie_weights()  # moving to the meta device parted what was tied
    return model


def _stored(model: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones once under their first name."""
    unique = {name for name, _ in model.named_parameters()}
    named = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in unique or name not in named
    }


def _converted(module: Any) -> bool:
    """Whether transformers changes tensors between files and model (old releases never do).

    A quantized checkpoint holds codes whose scales lie elsewhere.
    """
    if getattr(module.config, "quantization_config", None):
        return True
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return False
    return bool(get_model_conversion_mapping(module, add_legacy=False))


class _Place(NamedTuple):
    path: Path
    shape: tuple[int, ...]


def _files(folder: Path) -> dict[str, _Place]:
    """Where each plain tensor lies, and its shape; empty where a file can't be read."""
    found: dict[str, _Place] = {}
    with suppress(SafetensorError, OSError):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 -- not a dict
                    lazy = file.get_slice(name)
                    if lazy.get_dtype() not in SCALED:
                        found[name] = _Place(path, tuple(lazy.get_shape()))
    return found


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
