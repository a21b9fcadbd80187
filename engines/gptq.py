"""GPTQ checkpoints, a scheme a layer through GPTQModel's `dynamic`: vLLM and SGLang load them.

A matrix lies there turned over: words of codes run along the inputs, one column an output. Our
streams are the same bits, so nothing is quantized again. Symmetric integers have the zero point
2^(b-1), stored less one.
"""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Export
from engines.checkpoint_files import assembled
from engines.checkpoint_target import CheckpointTarget
from engines.declared import Declared
from engines.regular import group_of, integer, most_common, named
from engines.words import as_words
from quantization.errors import ExportError
from quantization.formats import FORMATS, Packed
from quantization.packing import pack_bits, unpack_bits
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout

SKIP, CHANGE = "-:", "+:"
"""How keys of `dynamic` begin; a regular expression that module names are matched with follows."""


class GPTQ(Declared):
    """What GPTQ checkpoints hold, and its bytes."""

    def __init__(self) -> None:
        super().__init__("gptq")

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """See `Rules.nbytes`: zero points and an index a column come on top."""
        if scheme.weight == FULL_PRECISION:
            return 2 * prod(shape)
        rows, columns = shape
        format = integer(scheme.weight)
        zeros = rows * -(-columns // group_of(format, columns)) * format.element.bits // 8
        return format.nbytes(shape) + zeros + 4 * columns


class GPTQCheckpoint(CheckpointTarget):
    """Writes the checkpoint; reads it back by the documented layout, with code of its own.

    GPTQModel has no loader that runs everywhere: its kernels are built for GPUs.
    """

    name = "gptq"
    engine = "gptq"
    dtype = torch.float16
    rules = GPTQ()

    def stored(self, packed: Packed) -> dict[str, Tensor]:
        """See `CheckpointTarget.stored`."""
        format, (rows, columns) = integer(packed.format), packed.shape
        bits, group = format.element.bits, group_of(format, columns)
        scales = packed.tensors["scales"]
        zeros = torch.full((scales.shape[-1], rows), 2 ** (bits - 1) - 1)
        return {
            "qweight": as_words(packed.tensors["codes"]).mT,
            "qzeros": as_words(pack_bits(zeros, bits)),
            "scales": scales.mT,
            "g_idx": torch.arange(columns, dtype=torch.int32) // group,
        }

    def config_of(self, layout: Layout, schemes: Sequence[Scheme]) -> dict[str, Any]:
        """See `CheckpointTarget.config_of`."""
        return {"quantization_config": config_of(named(layout, schemes))}

    def load(self, export: Export, folder: Path) -> nn.Module:
        """See the class."""
        assert export.evaluator is not None
        formats = dict(zip(*_places(export), strict=True))

        def value_of(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
            module = name.removesuffix(".weight")
            parts = {key: tensors[f"{module}.{key}"] for key in ("qweight", "qzeros", "scales")}
            return _values(parts, integer(formats[module]).element.bits).to(bank.dtype)

        bank = export.evaluator.bank
        return assembled(folder, bank.dtype, value_of)

    def remarks(self, export: Export, folder: Path) -> dict[str, Any]:
        """How to serve it."""
        return {"serve": "vllm serve DIR --dtype half", "loader": "by the documented layout"}


def config_of(formats: Mapping[str, str]) -> dict[str, Any]:
    """The checkpoint's `quantization_config` for the format of each linear module."""
    base = most_common(formats)
    dynamic: dict[str, dict[str, Any]] = {}
    for name, format in formats.items():
        if format == FULL_PRECISION:
            dynamic[SKIP + _exactly(name)] = {}
        elif format != base:
            dynamic[CHANGE + _exactly(name)] = _arguments(format)
    return {
        "quant_method": "gptq", "checkpoint_format": "gptq", "desc_act": False, "lm_head": False,
        **_arguments(base), "dynamic": dynamic,
    }  # fmt: skip


def formats_of(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Undo `config_of`, and read other people's: the format of each of these modules.

    Rules are tried in their order, and the first that matches counts, as in GPTQModel.

    Raises:
        ExportError: bits or groups that no format of ours stands for.
    """
    import re

    found = {}
    for name in names:
        arguments: dict[str, Any] | None = dict(config)
        for rule, change in (config.get("dynamic") or {}).items():
            if re.match(rule.removeprefix(SKIP).removeprefix(CHANGE), name):
                arguments = None if rule.startswith(SKIP) else {**config, **change}
                break
        found[name] = FULL_PRECISION if arguments is None else _format_of(arguments)
    return found


def _arguments(format: str) -> dict[str, Any]:
    made = integer(format)
    return {
        "bits": made.element.bits,
        "group_size": made.columns or -1,
        "sym": not made.asymmetric,
    }


def _format_of(arguments: Mapping[str, Any]) -> str:
    group = arguments.get("group_size", 128)
    name = f"int{arguments['bits']}-{'channel' if group == -1 else f'g{group}'}"
    name += "" if arguments.get("sym", True) else "-asym"
    if name not in FORMATS:
        raise ExportError(
            f"no format here stands for GPTQ's {arguments['bits']} bits, group {group}"
        )
    return name


def _exactly(name: str) -> str:
    return f"^{name.replace('.', chr(92) + '.')}$"


def _places(export: Export) -> tuple[list[str], list[str]]:
    units = export.precision_map.units
    pairs = [(site, unit.scheme.weight) for unit in units for site in unit.sites]
    return [site for site, _ in pairs], [format for _, format in pairs]


def _values(parts: Mapping[str, Tensor], bits: int) -> Tensor:
    """Scales x (codes - (zeros + 1)), outputs x inputs."""
    scales = parts["scales"].float().mT
    rows = scales.shape[0]
    stream = parts["qweight"].mT.contiguous().view(torch.uint8)
    codes = unpack_bits(stream, bits, stream.shape[-1] * 8 // bits)
    zeros = unpack_bits(parts["qzeros"].contiguous().view(torch.uint8), bits, rows).mT + 1
    group = codes.shape[-1] // scales.shape[-1]
    return ((codes.unflatten(-1, (-1, group)) - zeros[..., None]) * scales[..., None]).flatten(-2)
