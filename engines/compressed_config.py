"""compressed-tensors' words: what a checkpoint's `quantization_config` says of a map, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from engines.file_names import ANY, any_expert
from quantization.errors import ExportError
from quantization.formats import FORMATS
from quantization.formats.elements import E4M3, SignedInteger
from quantization.formats.scaled import WHOLE, Scaled
from quantization.formats.scales import FP16, Rounded
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout

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
            "format": compression_of(scheme),
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


def compression_of(scheme: Scheme) -> str:
    """How the library calls the way in which a scheme's weights lie in files."""
    format: Any = FORMATS[scheme.weight]
    if scheme.activation != FULL_PRECISION and isinstance(format.element, SignedInteger):
        return BYTES
    if format.name == "nvfp4":
        return "nvfp4-pack-quantized"
    return PACKED if isinstance(format.element, SignedInteger) else FLOAT
