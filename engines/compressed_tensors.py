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
from engines.compressed_config import BYTES, PATTERN, compression_of, config_of
from engines.declared import Declared
from engines.reload import reload
from engines.vllm_caches import cache_flags, cache_options, layer_caches
from engines.vllm_reload import served
from engines.words import as_words, word_bytes
from quantization.errors import ExportError
from quantization.formats import FORMATS, Packed
from quantization.formats.elements import SignedInteger
from quantization.formats.scaled import WHOLE, Scaled
from quantization.packing import pack_bits, unpack_bits
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout, Unit

SHAPE_BYTES = 16
"""Of `weight_shape`: two 64-bit integers."""


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
        if compression_of(scheme) != BYTES:
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

    transformers (5.23) can't place packed zero points, since its skeleton has them unpacked, nor
    experts, which are no layers there. And the library (0.20) scales integer activations by the largest over 127.5, where vLLM's kernels take 127.
    """
    units = export.precision_map.weights
    active = any(unit.scheme.activation != FULL_PRECISION for unit in units)
    assert export.evaluator is not None
    mixture = any(unit.kind == "experts" for unit in export.evaluator.bank.layout.units)
    return mixture or _has_zeros(export) or (active and not _all_fp8(export))


def _has_zeros(export: Export) -> bool:
    formats = (FORMATS[scheme.weight] for scheme in export.precision_map.schemes)
    return any(isinstance(format, Scaled) and format.asymmetric for format in formats)
