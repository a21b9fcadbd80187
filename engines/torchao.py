"""torchao checkpoints through transformers: a tensor subclass a layer, told by `FqnToConfig`.

Our codes and scales become `IntxUnpackedToInt8Tensor` (a byte a code, whatever its bits) or
`Float8Tensor`; nothing is quantized again.
"""

import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_torchao_available

from engines.base import Export
from engines.checkpoint_target import CheckpointTarget
from engines.declared import BF16_SCALES, Declared
from engines.regular import group_of, integer, integer_named, named
from engines.reload import reload
from quantization.errors import ExportError
from quantization.formats import FORMATS, Packed
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout

FLOAT = "fp8-e4m3-channel"
PATTERN = "re:"
SCALE_BYTES, ZERO_BYTES = 2, 1


class TorchAO(Declared):
    """What torchao's tensor subclasses hold, and their bytes."""

    def __init__(self) -> None:
        super().__init__("torchao")

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """See `Rules.nbytes`."""
        if scheme.weight in (FULL_PRECISION, FLOAT):
            return FORMATS[scheme.weight].nbytes(shape)
        groups = shape[1] // group_of(integer(scheme.weight), shape[1])
        return prod(shape) + shape[0] * groups * (SCALE_BYTES + ZERO_BYTES)


class TorchAOCheckpoint(CheckpointTarget):
    """Writes the checkpoint; reads it back with transformers and torchao, which dequantizes it."""

    name = "torchao"
    engine = "torchao"
    rules = TorchAO()

    def stored(self, packed: Packed) -> dict[str, Tensor]:
        """See `CheckpointTarget.stored`."""
        made = _subclass(packed)
        return {name: getattr(made, name) for name in made.tensor_data_names}

    def name_of(self, parameter: str, name: str) -> str:
        """As torchao flattens its tensors."""
        module, _, leaf = parameter.rpartition(".")
        return f"{module}._{leaf}_{name}"

    def config_of(self, layout: Layout, schemes: Sequence[Scheme]) -> dict[str, Any]:
        """See `CheckpointTarget.config_of`."""
        from torchao.quantization import FqnToConfig
        from transformers import TorchAoConfig

        formats = named(layout, schemes)
        configs = OrderedDict((name, _config(format)) for name, format in formats.items())
        return {"quantization_config": TorchAoConfig(FqnToConfig(configs)).to_dict()}

    def metadata(self, layout: Layout, schemes: Sequence[Scheme]) -> Mapping[str, str]:
        """What torchao needs to make its tensors again."""
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        made = {
            site.parameter: _subclass(_blank(scheme, site.shape))
            for unit, scheme in zip(layout.units, schemes, strict=True)
            for site in unit.stored
            if scheme.weight != FULL_PRECISION
        }
        found: Mapping[str, str] = flatten_tensor_state_dict(made)[1]
        return found

    def write(self, export: Export, folder: Path) -> None:
        """See `Target.write`.

        Raises:
            ExportError: torchao isn't installed.
        """
        if not is_torchao_available():
            raise ExportError("this target is written with torchao: pip install 'bitfront[export]'")
        super().write(export, folder)

    def load(self, export: Export, folder: Path) -> nn.Module:
        """transformers, and torchao's own dequantization of each matrix."""
        assert export.evaluator is not None
        dtype = export.evaluator.bank.dtype
        model: nn.Module = reload(export, folder)
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and type(weight.data) is not Tensor:
                values = weight.data.dequantize().to(dtype)
                module._parameters["weight"] = nn.Parameter(values, requires_grad=False)
        return model

    def remarks(self, export: Export, folder: Path) -> dict[str, Any]:
        """How to use it."""
        return {"serve": "AutoModelForCausalLM.from_pretrained('DIR')"}


def formats_of(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Undo `config_of`: the format of each of these modules.

    Raises:
        ExportError: a configuration that no format of ours stands for.
    """
    from transformers import TorchAoConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that others chose
        read = TorchAoConfig.from_dict(dict(config))
    chosen = read.get_apply_tensor_subclass().fqn_to_config
    return {name: _format_of(_own(chosen, name)) for name in names}


def _own(chosen: Mapping[str, Any], name: str) -> Any:
    """A module's configuration: by its name, by the first pattern, or the usual one."""
    if name in chosen:
        return chosen[name]
    for pattern, config in chosen.items():
        if pattern.startswith(PATTERN) and re.fullmatch(pattern.removeprefix(PATTERN), name):
            return config
    return chosen.get("_default")


def _config(format: str) -> Any:
    """Torchao's configuration of a layer; None leaves it alone."""
    from torchao.quantization import Float8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    if format == FULL_PRECISION:
        return None
    if format == FLOAT:
        return Float8WeightOnlyConfig()
    made = integer(format)
    granularity = PerGroup(made.columns) if made.columns else PerAxis(0)
    return IntxWeightOnlyConfig(_integer_type(made.element.bits), granularity)


def _format_of(config: Any) -> str:
    from torchao.quantization import Float8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerGroup

    if config is None:
        return FULL_PRECISION
    if isinstance(config, Float8WeightOnlyConfig):
        return FLOAT
    if not isinstance(config, IntxWeightOnlyConfig) or config.mapping_type != MappingType.SYMMETRIC:
        raise ExportError(f"no format here stands for torchao's {config}")
    bits = int(str(config.weight_dtype).removeprefix("torch.int"))
    granularity = config.granularity
    group = granularity.group_size if isinstance(granularity, PerGroup) else None
    return integer_named(bits, group, end=BF16_SCALES)


def _subclass(packed: Packed) -> Any:
    """Torchao's tensor of the same values."""
    from torchao.quantization import Float8Tensor, IntxUnpackedToInt8Tensor

    columns = packed.shape[-1]
    scales = packed.tensors["scales"]
    if packed.format == FLOAT:
        codes = packed.tensors["codes"].view(torch.float8_e4m3fn)
        return Float8Tensor(codes, scales, [1, columns], dtype=torch.bfloat16)
    format = integer(packed.format)
    bits = format.element.bits
    if scales.is_meta:
        codes = torch.empty(packed.shape, dtype=torch.int8, device="meta")
    else:
        unpacked = format.element.unpack(packed.tensors["codes"], columns)
        codes = (unpacked - 2 ** (bits - 1)).to(torch.int8)
    zeros = torch.zeros(scales.shape, dtype=torch.int8, device=scales.device)
    block = (1, group_of(format, columns))
    return IntxUnpackedToInt8Tensor(
        codes, scales, zeros, _integer_type(bits), block, torch.bfloat16, None
    )


def _blank(scheme: Scheme, shape: tuple[int, ...]) -> Packed:
    """Tensors of the right shapes, without memory."""
    rows, columns = shape
    if scheme.weight == FLOAT:
        scales = torch.empty((rows, 1), dtype=torch.float32, device="meta")
    else:
        groups = columns // group_of(integer(scheme.weight), columns)
        scales = torch.empty((rows, groups), dtype=torch.bfloat16, device="meta")
    codes = torch.empty(shape, dtype=torch.uint8, device="meta")
    return Packed(scheme.weight, shape, {"codes": codes, "scales": scales})


def _integer_type(bits: int) -> torch.dtype:
    found: torch.dtype = getattr(torch, f"int{bits}")
    return found
