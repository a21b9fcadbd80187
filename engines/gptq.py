"""GPTQ checkpoints, a scheme a layer through GPTQModel's `dynamic`: vLLM and SGLang load them.

A matrix lies there turned over: words of codes run along the inputs, one column an output. Our
streams are the same bits, so nothing is quantized again. Symmetric integers have the zero point
2^(b-1), stored as such (`gptq_v2`). The older form stores it less one, and GPTQModel (7.0) puts that back
with the bits of the whole checkpoint, which breaks layers that have others; vLLM reads neither.
"""

import json
import re
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
from engines.file_names import ANY
from engines.regular import (
    bits_and_group,
    group_of,
    integer,
    integer_named,
    most_common,
    named,
)
from engines.vllm_reload import served
from engines.words import as_words
from quantization.formats import Packed
from quantization.packing import pack_bits, unpack_bits
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout

PARTS = ("qweight", "qzeros", "scales", "g_idx")
FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
}
"""What vLLM calls the matrix that a module is a part of, and looks rules up by."""
USUAL_GROUP = 128
VERSION = "gptq_v2"
FEW_BITS = ("int2", "int3")
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
        zeros = torch.full((scales.shape[-1], rows), 2 ** (bits - 1))
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
        bank = export.evaluator.bank
        return load_dense(folder, bank.dtype, trust_remote_code=bank.checkpoint.trust_remote_code)

    def remarks(self, export: Export, folder: Path) -> dict[str, Any]:
        """How to serve it: vLLM has kernels for 4 and 8 bits, GPTQModel for all."""
        units = export.precision_map.weights
        refused = [unit.name for unit in units if unit.scheme.weight.startswith(FEW_BITS)]
        serve = None if refused else "vllm serve DIR --dtype half"
        found = {} if refused else served(export, folder, dtype="half")
        told = {"serve": serve, "not_in_vllm": refused, "loader": "by the documented layout"}
        return {**told, **found}


def load_dense(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """The model of a folder with dequantized weights, each as its configuration says."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    less = int(config["checkpoint_format"] != VERSION)

    formats: dict[str, str] = {}  # of all at once: there may be thousands of rules

    def value_of(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        if not formats:
            suffix = f".{PARTS[0]}"
            made = [n.removesuffix(suffix) for n in tensors if n.endswith(suffix)]
            formats.update(formats_of(config, made))
        module = name.removesuffix(".weight")
        parts = {key: tensors[f"{module}.{key}"] for key in PARTS}
        return _values(parts, integer(formats[module]).element.bits, less).to(dtype)

    return assembled(folder, dtype, value_of, trust_remote_code=trust_remote_code)


def config_of(formats: Mapping[str, str]) -> dict[str, Any]:
    """The checkpoint's `quantization_config` for the format of each linear module."""
    base = most_common(formats)
    dynamic: dict[str, dict[str, Any]] = {}
    for name, format in formats.items():
        if format == FULL_PRECISION:
            dynamic[SKIP + _exactly(name)] = {}
        elif format != base:
            dynamic[CHANGE + _exactly(name)] = bits_and_group(format)
    return {
        "quant_method": "gptq", "checkpoint_format": VERSION, "desc_act": False, "lm_head": False,
        **bits_and_group(base), "dynamic": dynamic,
    }  # fmt: skip


def formats_of(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Undo `config_of`, and read other people's: the format of each of these modules.

    Rules are tried in their order, and the first that matches counts, as in GPTQModel.

    Raises:
        ExportError: bits or groups that no format of ours stands for.
    """
    found = {}
    rules = [
        (re.compile(rule.removeprefix(SKIP).removeprefix(CHANGE)), rule.startswith(SKIP), change)
        for rule, change in (config.get("dynamic") or {}).items()
    ]
    for name in names:
        arguments: dict[str, Any] | None = dict(config)
        for pattern, skips, change in rules:
            if pattern.match(name):
                arguments = None if skips else {**config, **change}
                break
        found[name] = FULL_PRECISION if arguments is None else _format_of(arguments)
    return found


def _format_of(arguments: Mapping[str, Any]) -> str:
    asymmetric = not arguments.get("sym", True)
    group = arguments.get("group_size", USUAL_GROUP)
    return integer_named(arguments["bits"], group, asymmetric=asymmetric)


def _exactly(name: str) -> str:
    """A pattern for a module, and for what vLLM fuses it into."""
    parent, _, leaf = name.rpartition(".")
    if ANY in name:  # vLLM looks for the module that holds them all
        mixture = parent.removesuffix(f".{ANY}")
        return f"^{re.escape(mixture)}(\\.\\d+\\.{re.escape(leaf)})?$"
    if parent.endswith(".experts"):
        return f"^{re.escape(parent)}(\\.{re.escape(leaf)})?$"
    place = re.escape(f"{parent}." if parent else "")
    return f"^{place}({leaf}|{FUSED[leaf]})$" if leaf in FUSED else f"^{place}{re.escape(leaf)}$"


def _values(parts: Mapping[str, Tensor], bits: int, less: int) -> Tensor:
    """Scales times (codes - zeros), outputs x inputs; `g_idx` is each input's group."""
    group = parts["g_idx"].long()
    scales = parts["scales"].float().mT
    rows = scales.shape[0]
    stream = parts["qweight"].mT.contiguous().view(torch.uint8)
    codes = unpack_bits(stream, bits, stream.shape[-1] * 8 // bits)
    zeros = unpack_bits(parts["qzeros"].contiguous().view(torch.uint8), bits, rows).mT + less
    return (codes - zeros[:, group]) * scales[:, group]
