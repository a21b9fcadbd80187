"""compressed-tensors checkpoints, which vLLM and SGLang load: our bytes under the library's names.

Codes of integers are the same bit streams (padded to whole words a row), so nothing is quantized
again. Zero points lie along the rows there, and NVFP4's tensor scale is a divisor.

    intB-gG-bf16 (-asym), intB-channel-bf16 (-asym)     pack-quantized
    fp8-e4m3, fp8-e4m3-channel (/fp8-e4m3-token)        float-quantized
    int8-channel-bf16/int8-token                        int-quantized
    nvfp4                                               nvfp4-pack-quantized
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_compressed_tensors_available

from engines.base import Export
from engines.checkpoint_files import assembled
from engines.checkpoint_target import CheckpointTarget
from engines.declared import Declared
from engines.file_names import ANY, any_expert
from engines.reload import reload
from engines.vllm_caches import cache_flags, cache_options, layer_caches
from engines.vllm_reload import served
from engines.words import as_words, word_bytes
from quantization.errors import ExportError
from quantization.formats import FORMATS, Packed
from quantization.formats.elements import E4M3, SignedInteger
from quantization.formats.scaled import WHOLE, Scaled
from quantization.formats.scales import FP16, Rounded
from quantization.packing import pack_bits, unpack_bits
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout, Unit

SHAPE_BYTES = 16
"""Of `weight_shape`: two 64-bit integers."""
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
PACKED, FLOAT, MIXED = "pack-quantized", "float-quantized", "mixed-precision"
PATTERN = "re:"
BYTES = "int-quantized"
"""Of integers that are multiplied as such: a byte each."""
TOKENS: dict[str, dict[str, Any]] = {
    "int8-token": {"num_bits": 8, "type": "int"},
    "fp8-e4m3-token": {"num_bits": 8, "type": "float"},
}
"""Activations that are quantized as they come, a scale a token."""


class CompressedTensors(Declared):
    """What a runtime of compressed-tensors checkpoints serves, and their bytes."""

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """See `Rules.nbytes`."""
        format = FORMATS[scheme.weight]
        own = format.nbytes(shape)
        if scheme.activation != FULL_PRECISION:
            return own  # a byte a code
        if not isinstance(format, Scaled) or not isinstance(format.element, SignedInteger):
            return own  # floats and full precision
        rows, columns = shape
        bits = format.element.bits
        codes = rows * (word_bytes(columns * bits) - format.element.packed_bytes(columns))
        if not format.asymmetric:
            return own + codes + SHAPE_BYTES
        groups = 1 if format.columns is WHOLE else -(-columns // format.columns)
        zeros = groups * word_bytes(rows * bits) - rows * format.element.packed_bytes(groups)
        return own + codes + zeros + SHAPE_BYTES


class VLLM(CompressedTensors):
    """vLLM."""

    def __init__(self) -> None:
        super().__init__("vllm")

    def unit_refusal(self, unit: Unit, scheme: Scheme) -> str | None:
        """See `Rules.unit_refusal`: what is fused has one scale a tensor there."""
        if scheme.weight == "nvfp4" and unit.kind != "experts" and len(unit.stored) > 1:
            return "vLLM gives fused NVFP4 matrices one tensor scale, where each has its own"
        return super().unit_refusal(unit, scheme)


class Library(CompressedTensors):
    """Whatever the compressed-tensors library unpacks."""

    def __init__(self) -> None:
        super().__init__("compressed-tensors")


class CompressedTensorsFiles(CheckpointTarget):
    """Writes the checkpoint, and reads it back with transformers and the library itself."""

    name = "compressed-tensors"
    engine = "compressed-tensors"
    rules = Library()

    def stored_in(self, scheme: Scheme, packed: Packed) -> dict[str, Tensor]:
        """See `CheckpointTarget.stored_in`."""
        if _compression(scheme) != BYTES:
            return self.stored(packed)
        codes = packed.tensors["codes"].view(torch.uint8).reshape(packed.shape)
        return {
            "weight": (codes.int() - 128).to(torch.int8), "weight_scale": packed.tensors["scales"],
        }  # fmt: skip

    def stored(self, packed: Packed) -> dict[str, Tensor]:
        """See `CheckpointTarget.stored`."""
        format, tensors = FORMATS[packed.format], packed.tensors
        assert isinstance(format, Scaled)
        if format.name == "nvfp4":
            return {
                "weight_packed": tensors["codes"],
                "weight_scale": tensors["scales"],
                "weight_global_scale": 1 / tensors["tensor_scale"].reshape(1),
            }
        if not isinstance(format.element, SignedInteger):
            scales = tensors["scales"]
            return {
                "weight": tensors["codes"].view(torch.float8_e4m3fn),
                "weight_scale": scales.reshape(1) if format.rows is WHOLE else scales,
            }
        bits = format.element.bits
        found = {
            "weight_packed": as_words(tensors["codes"]),
            "weight_scale": tensors["scales"],
            "weight_shape": torch.tensor(packed.shape),
        }
        if format.asymmetric:
            zeros = unpack_bits(tensors["zeros"], bits, tensors["scales"].shape[-1])
            found["weight_zero_point"] = as_words(pack_bits(zeros.mT.contiguous(), bits)).mT
        return found

    def config_of(self, layout: Layout, schemes: Sequence[Scheme]) -> dict[str, Any]:
        """See `CheckpointTarget.config_of`.

        Raises:
            ExportError: a KV cache that vLLM can't be told of.
        """
        layer_caches(layout, schemes)
        return {"quantization_config": config_of(layout, schemes)}

    def load(self, export: Export, folder: Path) -> Any:
        """transformers, or the library alone (see `_alone`).

        Scales in bfloat16 want a model in bfloat16; those of FP8 are float32, and would be rounded.

        Raises:
            ExportError: the library isn't installed.
        """
        if not is_compressed_tensors_available():
            raise ExportError(
                "the export is read back with compressed-tensors: pip install 'bitfront[export]'"
            )
        assert export.evaluator is not None
        bank = export.evaluator.bank
        if _alone(export):
            return load_dense(
                folder, bank.dtype, trust_remote_code=bank.checkpoint.trust_remote_code
            )
        with redirect_stderr(StringIO()):  # bars
            model = reload(export, folder, None if _all_fp8(export) else torch.bfloat16)
            model(torch.zeros((1, 1), dtype=torch.long))  # decompresses, in its first pass
        return model.to(bank.dtype)

    def quantizes_inputs(self, export: Export) -> bool:
        """See `CheckpointTarget.quantizes_inputs`: transformers lets the library do it."""
        return not _alone(export)

    def remarks(self, export: Export, folder: Path) -> dict[str, Any]:
        """How to serve it, or which units vLLM has no kernels for."""
        vllm = VLLM()
        assert export.evaluator is not None
        units = zip(export.evaluator.bank.layout.units, export.precision_map.schemes, strict=True)
        refused = [unit.name for unit, scheme in units if vllm.unit_refusal(unit, scheme)]
        loader = "compressed-tensors" if _alone(export) else "transformers"
        layout, schemes = export.evaluator.bank.layout, export.precision_map.schemes
        caches = layer_caches(layout, schemes)
        serve = None if refused else f"vllm serve DIR{cache_flags(caches)}"
        found = served(export, folder, dtype="bfloat16", **cache_options(caches))
        return {"serve": serve, "not_in_vllm": refused, "loader": loader, **found}


def load_dense(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """The model of a folder, each matrix decompressed by the library under its own group."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(described)
    exact: dict[str, Any] = {}
    patterns: dict[str, Any] = {}
    for group in config.config_groups.values():
        for target in group.targets:
            (patterns if target.startswith(PATTERN) else exact)[target] = group

    def value_of(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        module = name.removesuffix(".weight")
        group = exact.get(module) or next(
            group for target, group in patterns.items() if match_name(module, target)
        )
        compressor = BaseCompressor.get_value_from_registry(group.format or config.format)
        names = compressor.compression_param_names(group)
        parts = {key: tensors[f"{module}.{key}"] for key in names}
        if "weight_scale" in parts:  # kernels multiply sums by it, and round no product of codes
            parts["weight_scale"] = parts["weight_scale"].float()
        values: Tensor = compressor.decompress(parts, group)["weight"]
        return values.to(dtype)

    return assembled(
        folder, dtype, value_of, is_plain=lambda t: t.dtype not in (torch.float8_e4m3fn, torch.int8),
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def _all_fp8(export: Export) -> bool:
    """Whether nothing else is quantized."""
    schemes = (Scheme(u.scheme.weight, u.scheme.activation) for u in export.precision_map.weights)
    return all(scheme.exact or scheme.weight.startswith("fp8") for scheme in schemes)


def _alone(export: Export) -> bool:
    """Whether the library unpacks the weights, and the rest is ours.

    transformers (5.23) can't place packed zero points: its skeleton has them unpacked, nor experts, which
    are no layers there. And the library (0.20) scales integer activations by the largest over 127.5, where vLLM's kernels take 127.
    """
    units = export.precision_map.weights
    active = any(unit.scheme.activation != FULL_PRECISION for unit in units)
    assert export.evaluator is not None
    mixture = any(unit.kind == "experts" for unit in export.evaluator.bank.layout.units)
    return mixture or _has_zeros(export) or (active and not _all_fp8(export))


def _has_zeros(export: Export) -> bool:
    formats = (FORMATS[scheme.weight] for scheme in export.precision_map.schemes)
    return any(isinstance(format, Scaled) and format.asymmetric for format in formats)


def config_of(layout: Layout, schemes: Sequence[Scheme]) -> dict[str, Any]:
    """The checkpoint's `quantization_config`: a group a format, its matrices by their names."""
    groups: dict[Scheme, list[str]] = {}
    ignored: list[str] = []
    for unit, scheme in zip(layout.units, schemes, strict=True):
        if unit.kind == "cache":
            continue
        names = [site.name for site in unit.sites]
        if scheme.exact:
            ignored += map(_target, names) if unit.kind != "embedding" else []
        else:
            groups.setdefault(scheme, []).extend(map(_target, names))
    found = {
        f"group_{number}": {
            "targets": names,
            "weights": arguments_of(scheme.weight),
            "input_activations": _inputs(scheme.activation),
            "output_activations": None,
            "format": _compression(scheme),
        }
        for number, (scheme, names) in enumerate(groups.items())
    }
    kinds = {group["format"] for group in found.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": kinds.pop() if len(kinds) == 1 else MIXED,
        "config_groups": found,
        "ignore": [*ignored, *(kept.name for kept in layout.kept)],
        "kv_cache_scheme": None,  # wants scales in the checkpoint; vLLM's command doesn't
    }


def _target(name: str) -> str:
    """A module's name, or a pattern for those of all experts."""
    return f"{PATTERN}^{any_expert(name)}$" if ANY in name else name


def formats_of(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Undo `config_of`, and read other people's configurations: the format of each module.

    Args:
        config: a `quantization_config` of compressed-tensors.
        names: the model's linear modules.

    Raises:
        ExportError: a group that no format of ours stands for.
    """
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    read = QuantizationConfig.model_validate(dict(config))
    found = dict.fromkeys(names, FULL_PRECISION)
    for group in read.config_groups.values():
        assert not isinstance(group, list)
        if group.output_activations:
            raise ExportError("the configuration quantizes outputs, which aren't measured here")
        weights = format_of(group.weights.model_dump() if group.weights else None)
        given = group.input_activations
        format = Scheme(weights, _activation(given.model_dump() if given else None)).name
        for name in names:
            ignored = any(match_name(name, pattern) for pattern in read.ignore or [])
            chosen = any(t == "Linear" or match_name(name, t) for t in group.targets)
            if chosen and not ignored:
                found[name] = format
    return found


def cache_format_of(config: Mapping[str, Any]) -> str:
    """What a configuration says of the KV cache.

    Raises:
        ExportError: no format of ours is that.
    """
    arguments = config.get("kv_cache_scheme")
    return format_of(arguments) if arguments else FULL_PRECISION


def arguments_of(name: str) -> dict[str, Any]:
    """compressed-tensors' `QuantizationArgs` of a format.

    Raises:
        ExportError: it has none.
    """
    format = FORMATS[name]
    if not isinstance(format, Scaled) or not _known(format):
        raise ExportError(f"compressed-tensors has no word for {name}")
    if format.name == "nvfp4":
        return {**NVFP4, "symmetric": True}
    strategy = (
        "tensor" if format.rows is WHOLE else "channel" if format.columns is WHOLE else "group"
    )
    return {
        "num_bits": format.element.bits,
        "type": "int" if isinstance(format.element, SignedInteger) else "float",
        "symmetric": not format.asymmetric,
        "strategy": strategy,
        "group_size": format.columns if strategy == "group" else None,
    }


def format_of(arguments: Mapping[str, Any] | None) -> str:
    """Undo `arguments_of`, scales in bfloat16 where there is a choice.

    Raises:
        ExportError: no format of ours is that.
    """
    if arguments is None:
        return FULL_PRECISION
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size")
    wanted = {key: arguments.get(key) for key in keys}
    if wanted["strategy"] in ("tensor", "channel"):
        wanted["group_size"] = None
    for name in FORMATS:
        format = FORMATS[name]
        if isinstance(format, Scaled) and _known(format) and format.scale != FP16:
            own = arguments_of(name)
            if {key: own.get(key) for key in keys} == wanted:
                return name
    raise ExportError(f"no format here stands for compressed-tensors' {wanted}")


def _inputs(activation: str) -> dict[str, Any] | None:
    if activation == FULL_PRECISION:
        return None
    if activation not in TOKENS:
        raise ExportError(f"compressed-tensors has no word here for activations in {activation}")
    return {**TOKENS[activation], "symmetric": True, "strategy": "token", "dynamic": True}


def _activation(arguments: Mapping[str, Any] | None) -> str:
    """Undo `_inputs`."""
    if arguments is None:
        return FULL_PRECISION
    for name in TOKENS:
        own = _inputs(name) or {}
        if {key: arguments.get(key) for key in own} == own:
            return name
    raise ExportError(
        f"no activation format here stands for compressed-tensors' {dict(arguments)}; known are "
        f"dynamic ones with a scale a token: {', '.join(TOKENS)}"
    )


def _known(format: Scaled) -> bool:
    """Whether the checkpoint can hold it."""
    if format.name == "nvfp4" or (format.element is E4M3 and format.rows in (1, WHOLE)):
        return format.columns is WHOLE or format.name == "nvfp4"
    return (
        isinstance(format.element, SignedInteger)
        and isinstance(format.scale, Rounded)
        and not format.real_zeros
    )


def _compression(scheme: Scheme) -> str:
    format: Any = FORMATS[scheme.weight]
    if scheme.activation != FULL_PRECISION and isinstance(format.element, SignedInteger):
        return BYTES
    if format.name == "nvfp4":
        return "nvfp4-pack-quantized"
    return PACKED if isinstance(format.element, SignedInteger) else FLOAT
