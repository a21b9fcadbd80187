"""MLX checkpoints for Apple silicon: each layer's bits and group in `config.json`.

MLX's affine values are scale x code + bias. For symmetric integers the bias is -2^(b-1) scales, a
power of two that no type rounds, and its words of codes are our streams: nothing is quantized again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Export
from engines.checkpoint_files import assembled
from engines.checkpoint_target import CheckpointTarget
from engines.declared import BF16_SCALES, Declared
from engines.file_names import Place, Places, places_of
from engines.regular import integer, integer_named, most_common, named
from engines.words import as_words
from quantization.errors import ExportError
from quantization.formats import Packed
from quantization.packing import unpack_bits
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout

AFFINE = "affine"
STACKED = "switch_mlp"
"""What MLX's models call all experts of a layer together."""
LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Other names of an expert's matrices."""


class MLX(Declared):
    """What MLX multiplies by, and its bytes."""

    def __init__(self) -> None:
        super().__init__("mlx")

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """See `Rules.nbytes`: a bias beside each scale."""
        if scheme.weight == FULL_PRECISION:
            return 2 * prod(shape)
        format = integer(scheme.weight)
        assert format.columns is not None
        return format.nbytes(shape) + 2 * shape[0] * (shape[1] // format.columns)


class MLXCheckpoint(CheckpointTarget):
    """Writes the checkpoint; reads it back by the documented layout, with code of its own.

    MLX itself runs on Apple silicon, and on Linux where its wheel installs.
    """

    name = "mlx"
    engine = "mlx"
    rules = MLX()

    def stored(self, packed: Packed) -> dict[str, Tensor]:
        """See `CheckpointTarget.stored`."""
        scales = packed.tensors["scales"]
        return {
            "weight": as_words(packed.tensors["codes"]).view(torch.uint32),
            "scales": scales,
            "biases": -scales * 2 ** (integer(packed.format).element.bits - 1),
        }

    def config_of(self, layout: Layout, schemes: Sequence[Scheme]) -> dict[str, Any]:
        """See `CheckpointTarget.config_of`."""
        found = config_of(named(layout, schemes, embeddings=True))
        return {"quantization": found, "quantization_config": found}

    def places(self, module: Any) -> Places:
        """See `CheckpointTarget.places`: all gates of a layer in one tensor, all ups, all downs."""
        found = dict(places_of(module))
        for name, places in found.items():
            if own := [place for place in places if place.expert == 0]:
                found[name] = tuple(replace(p, name=_stacked(p), expert=None) for p in own)
        return found

    def metadata(self, layout: Layout, schemes: Sequence[Scheme]) -> Mapping[str, str]:
        """What mlx-lm looks for."""
        return {"format": "mlx"}

    def load(self, export: Export, folder: Path) -> nn.Module:
        """See the class."""
        assert export.evaluator is not None
        bank = export.evaluator.bank
        return load_dense(folder, bank.dtype, trust_remote_code=bank.checkpoint.trust_remote_code)

    def remarks(self, export: Export, folder: Path) -> dict[str, Any]:
        """How to serve it."""
        return {"serve": "mlx_lm.server --model DIR", "loader": "by the documented layout"}


def load_dense(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """The model of a folder with dequantized weights, each as its configuration says."""
    config = json.loads((folder / "config.json").read_text())["quantization"]

    def replaced(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        module = name.removesuffix(".weight")
        scales, biases = (tensors[f"{module}.{key}"].float() for key in ("scales", "biases"))
        words = tensors[name].view(torch.uint8)
        bits = integer(formats_of(config, [module])[module]).element.bits
        codes = unpack_bits(words, bits, words.shape[-1] * 8 // bits)
        group = codes.shape[-1] // scales.shape[-1]
        values = codes.unflatten(-1, (-1, group)) * scales[..., None] + biases[..., None]
        return values.flatten(-2).to(dtype)

    return assembled(
        folder,
        dtype,
        replaced,
        is_plain=Tensor.is_floating_point,
        places=MLXCheckpoint().places,
        trust_remote_code=trust_remote_code,
    )


def _stacked(place: Place) -> str:
    """The tensor of all experts, of one's."""
    path, _, rest = place.module.partition(".experts.")
    leaf = rest.rpartition(".")[2]
    return f"{path}.{STACKED}.{LEAVES.get(leaf, leaf)}.weight"


def config_of(formats: Mapping[str, str]) -> dict[str, Any]:
    """MLX's `quantization` for the format of each linear module."""
    base = most_common(formats)
    layers: dict[str, Any] = {}
    for name, format in formats.items():
        layers[name] = False if format == FULL_PRECISION else _arguments(format)
    return {**_arguments(base), **layers}


def formats_of(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Undo `config_of`, and read other people's: the format of each of these modules.

    Raises:
        ExportError: a mode, bits or groups that no format of ours stands for.
    """
    found = {}
    for name in names:
        own = config.get(name, config)
        found[name] = FULL_PRECISION if own is False else _format_of({**config, **dict(own or {})})
    return found


def _arguments(format: str) -> dict[str, Any]:
    made = integer(format)
    return {"group_size": made.columns, "bits": made.element.bits, "mode": AFFINE}


def _format_of(arguments: Mapping[str, Any]) -> str:
    if (mode := arguments.get("mode", AFFINE)) != AFFINE:
        raise ExportError(f"no format here stands for MLX's mode {mode}")
    return integer_named(arguments["bits"], arguments.get("group_size", 64), end=BF16_SCALES)
