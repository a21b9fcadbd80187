"""A GGUF file: a model's metadata, its tokenizer, and each tensor as it is given, byte for byte.

Families of models are a line each in `FAMILIES`; names of tensors come from gguf-py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import pi
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from engines.gguf_tokenizer import add_tokenizer
from quantization.checkpoints import Checkpoint, load_config
from quantization.errors import ExportError
from quantization.formats.gguf import TYPES
from quantization.registry import Registry
from quantization.units import Site

GUESSED = 1024  # llama.cpp's file type of mixes that have no name
F32 = "f32"
ROPE_FREQUENCIES = "rope_freqs.weight"
ROTARY = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls an architecture.

    Args:
        name: in GGUF files.
        interleaved: whether its rotary embedding turns neighbours, where transformers turns halves;
            rows of queries and keys then change places.
        normalised: of mixtures, whether the weights of the experts that a token goes to sum to 1.
    """

    name: str
    interleaved: bool = False
    normalised: bool | None = None


FAMILIES: Registry[Family] = Registry("kind of model for GGUF files")
FAMILIES.add("llama", Family("llama", interleaved=True))
FAMILIES.add("mistral", Family("llama", interleaved=True))
FAMILIES.add("qwen2", Family("qwen2"))
FAMILIES.add("qwen3", Family("qwen3"))
FAMILIES.add("mixtral", Family("llama", interleaved=True, normalised=True))
FAMILIES.add("qwen2_moe", Family("qwen2moe", normalised=False))
FAMILIES.add("qwen3_moe", Family("qwen3moe", normalised=True))


@dataclass(frozen=True)
class Stored:
    """A tensor as it goes into the file.

    Args:
        parameter: its name in transformers' state dict.
        type: ggml's, or `f32`.
        shape: rows x columns, or a vector's length.
        read: gives the bytes, uint8 rows x row bytes, when their turn comes.
    """

    parameter: str
    type: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[np.uint8]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without the padding behind them."""
        row = 4 * self.shape[-1] if self.type == F32 else TYPES[self.type].row_bytes(self.shape[-1])
        return int(np.prod(self.shape[:-1], dtype=np.int64)) * row


def family_of(config: Any) -> Family:
    """What a model is to llama.cpp, by its transformers configuration.

    Raises:
        UnknownNameError: a kind of model that isn't written, with the nearest.
        ExportError: a rotary embedding that isn't.
    """
    family = FAMILIES[config.model_type]
    if family.normalised is not None:
        _check_experts(config, family.normalised)
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in ROTARY:
        raise ExportError(
            f"the model's rotary embedding is scaled by '{kind}', which GGUF files from here don't "
            f"know; they know {', '.join(ROTARY)}"
        )
    return family


def _check_experts(config: Any, normalised: bool) -> None:
    """Refuse mixtures that llama.cpp computes otherwise."""
    dense = (
        getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) > 1
    )
    if dense:
        raise ExportError(
            "llama.cpp wants experts in every layer of this kind of model, and some have none "
            "(mlp_only_layers, decoder_sparse_step); it can't be exported to GGUF"
        )
    if getattr(config, "norm_topk_prob", normalised) != normalised:
        raise ExportError(
            f"llama.cpp {'always' if normalised else 'never'} normalises the weights of a token's "
            f"experts in this kind of model, and this one has norm_topk_prob={not normalised}; it "
            "can't be exported to GGUF"
        )


def parts_of(site: Site) -> list[tuple[str, tuple[int, ...], slice]]:
    """The tensors that a site is in the file: name, shape, and which of its rows.

    Packed experts keep gates and ups in one parameter, one above the other, and GGUF files don't.
    """
    if len(site.shape) < 3:
        return [(site.parameter, site.shape, slice(None))]
    path, _, leaf = site.parameter.rpartition(".")
    experts, rows, columns = site.shape
    if leaf != "gate_up_proj":
        return [(f"{site.parameter}.weight", site.shape, slice(None))]
    half = rows // 2
    return [
        (f"{path}.{name}.weight", (experts, half, columns), slice(start, start + half))
        for name, start in (("gate_proj", 0), ("up_proj", half))
    ]


def write_gguf(
    path: Path, checkpoint: Checkpoint, tensors: Sequence[Stored], *, vocabulary: bool = True
) -> None:
    """Write a model; one tensor at a time is in memory.

    Args:
        path: the file.
        checkpoint: whose configuration and tokenizer it gets.
        tensors: in the order of the file.
        vocabulary: False leaves the tokenizer out, for files that are only timed.

    Raises:
        ExportError: a kind of model or a tensor that GGUF files of this kind don't know.
        OSError: the disk refuses.
    """
    config = load_config(checkpoint)
    family = family_of(config)
    writer = gguf.GGUFWriter(path, family.name)
    _add_model(writer, config, checkpoint)
    embedding = next(t for t in tensors if t.parameter.endswith("embed_tokens.weight"))
    if vocabulary:
        add_tokenizer(writer, checkpoint, embedding.shape[0])
    else:
        writer.add_tokenizer_model("no_vocab")
    tensors = [*tensors, *_rope_frequencies(config)]
    name_of = tensor_names(config)
    for tensor in tensors:
        raw = None if tensor.type == F32 else gguf.GGMLQuantizationType(TYPES[tensor.type].number)
        dtype, shape = (np.float32, tensor.shape) if raw is None else (np.uint8, _bytes_of(tensor))
        writer.add_tensor_info(
            name_of(tensor.parameter), shape, np.dtype(dtype), tensor.nbytes, raw
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        data = tensor.read()
        writer.write_tensor_data(_turned(data, tensor.parameter, config, family))
    writer.close()


def tensor_names(config: Any) -> Callable[[str], str]:
    """What gives a parameter's name in the files of a model of that configuration."""
    family = family_of(config)
    kind = next(k for k, n in gguf.MODEL_ARCH_NAMES.items() if n == family.name)
    return partial(_name, gguf.get_tensor_name_map(kind, config.num_hidden_layers))


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors of a file, without padding."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


def _bytes_of(tensor: Stored) -> tuple[int, ...]:
    return (*tensor.shape[:-1], TYPES[tensor.type].row_bytes(tensor.shape[-1]))


def _name(names: gguf.TensorNameMap, parameter: str) -> str:
    if parameter == ROPE_FREQUENCIES:
        return ROPE_FREQUENCIES
    found = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ExportError(
            f"llama.cpp has no place for '{parameter}' in this kind of model; "
            "it can't be exported to GGUF"
        )
    return str(found)


def _add_model(writer: gguf.GGUFWriter, config: Any, checkpoint: Checkpoint) -> None:
    """Sizes and constants."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_name(Path(checkpoint.name).name.removesuffix(".gguf"))
    writer.add_file_type(GUESSED)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    if family_of(config).normalised is not None:
        _add_experts(writer, config)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _add_experts(writer: gguf.GGUFWriter, config: Any) -> None:
    """How many, how many a token goes to, and their widths."""
    count = getattr(config, "num_local_experts", None) or config.num_experts
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if width := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(width)
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(shared)


def rope_divisors(config: Any) -> NDArray[np.float32]:
    """Llama 3's divisors of the rotary frequencies, half a head's width; empty for other kinds.

    Source: `_compute_llama3_parameters` in transformers' modeling_rope_utils.py.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return np.empty(0, dtype=np.float32)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequency = rope["rope_theta"] ** -(np.arange(0, head, 2) / head)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors: NDArray[np.float32] = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return divisors.astype(np.float32)


def _rope_frequencies(config: Any) -> list[Stored]:
    """llama.cpp reads the divisors as a tensor."""
    divisors = rope_divisors(config)
    stored = Stored(ROPE_FREQUENCIES, F32, divisors.shape, lambda: divisors.view(np.uint8))
    return [stored] if len(divisors) else []


def _turned(
    data: NDArray[np.uint8], parameter: str, config: Any, family: Family
) -> NDArray[np.uint8]:
    """Rows of queries and keys in the order that llama.cpp's rotary embedding wants.

    Blocks lie within rows, so their bytes move unchanged.
    """
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads or config.num_attention_heads,
    }.get(parameter.split(".")[-2])
    if not family.interleaved or heads is None:
        return data
    rows = data.reshape(heads, 2, -1, data.shape[-1] if data.ndim > 1 else 4)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(data.shape)
