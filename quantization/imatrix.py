"""llama.cpp's importance matrices: the mean square of every input of a layer, from and to files.

llama-imatrix writes GGUF files (`<tensor>.in_sum2` and `.counts`, sums over tokens and their
number) and, before 2025 and on demand, a bare binary (`.dat`). Files name tensors as GGUF does
(`blk.0.attn_q.weight`), we as transformers does. Inputs are columns, so neither the rows that
llama.cpp's converters permute nor those that transformers fuses (gate and up) matter here.
"""

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantization.cache import write_whole
from quantization.errors import QuantizationError
from quantization.units import Layout, Site

# where a model type is not GGUF's name of the architecture with other dashes
ARCHITECTURES = {
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_bigcode": "starcoder",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
}

Entries = dict[str, Tensor]
"""Mean squares by the GGUF name of the tensor: matrices x columns, or flat where that is lost."""


def read_imatrix(path: Path, layout: Layout, architecture: str) -> dict[str, Tensor]:
    """The importance in a file, by parameter: `columns`, of packed experts `experts x columns`.

    Sites without an entry are left out; llama-imatrix makes none for embeddings, and by default
    none for the head. `architecture` is the model type of transformers' configuration, or GGUF's
    name for it.

    Raises:
        QuantizationError: unreadable, damaged, made for another shape or for no site at all.
    """
    entries = _entries(path)
    names = tensor_names(layout, architecture)
    found = {}
    for site in _sites(layout):
        entry = next((entries[name] for name in names[site.parameter] if name in entries), None)
        if entry is not None:
            shape = (*site.shape[:-2], site.shape[-1])
            if entry.numel() != prod(shape):
                raise QuantizationError(
                    f"'{path}' is for another model: {entry.numel()} values for "
                    f"{site.parameter}, which has {' x '.join(map(str, shape))} inputs"
                )
            found[site.parameter] = entry.reshape(shape)
    if not found:
        some = next(iter(entries), "nothing")
        raise QuantizationError(
            f"'{path}' has no entry for any layer of this {architecture} model (it has {some}, …)"
        )
    return found


def write_imatrix(
    path: Path,
    importance: Mapping[str, Tensor],
    layout: Layout,
    architecture: str,
    text: str,
    chunks: int,
    length: int,
) -> None:
    """Write importance by parameter as the GGUF file that `llama-quantize --imatrix` reads.

    `text` names what it was computed on, `chunks` pieces of `length` tokens.
    """
    import gguf

    names = tensor_names(layout, architecture)
    tokens = chunks * length

    def write(work: str) -> None:
        writer = gguf.GGUFWriter(work, arch="")  # llama-imatrix names none either
        writer.add_type(gguf.GGUFType.IMATRIX)
        writer.add_array(gguf.Keys.IMatrix.DATASETS, [text])
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, chunks)
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, length)
        for parameter, values in importance.items():
            sums = np.atleast_2d(values.float().numpy()) * np.float32(tokens)
            counts = np.full((len(sums), 1), tokens, np.float32)
            for name in names[parameter]:
                writer.add_tensor(f"{name}.in_sum2", sums)
                writer.add_tensor(f"{name}.counts", counts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_whole(path, write)


def tensor_names(layout: Layout, architecture: str) -> dict[str, tuple[str, ...]]:
    """GGUF's names of every stored parameter: two where it keeps gate and up apart, or none.

    Raises:
        QuantizationError: an architecture that GGUF doesn't know.
    """
    import gguf

    blocks = 1 + max((unit.layer for unit in layout.units if unit.layer is not None), default=0)
    table = gguf.get_tensor_name_map(_architecture(architecture), blocks)
    return {site.parameter: _names(table, site.parameter) for site in _sites(layout)}


def _names(table: Any, parameter: str) -> tuple[str, ...]:
    fused = parameter.removesuffix(".weight").endswith(".gate_up_proj")
    parts = [parameter.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
    for candidates in ([parameter], parts if fused else []):
        found = [table.get_name(name, try_suffixes=(".weight",)) for name in candidates]
        names = tuple(f"{name.removesuffix('.weight')}.weight" for name in found if name)
        if names:
            return names
    return ()


def _architecture(name: str) -> Any:
    """GGUF's number of an architecture."""
    import gguf

    known = {_plain(value): key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    wanted = _plain(ARCHITECTURES.get(name, name.removesuffix("_text")))
    if wanted not in known:
        raise QuantizationError(
            f"GGUF knows no architecture '{name}', so its tensors have no names"
        )
    return known[wanted]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _sites(layout: Layout) -> list[Site]:
    return [site for unit in layout.units for site in unit.stored]


def _entries(path: Path) -> Entries:
    if not path.is_file():
        raise QuantizationError(
            f"there is no file '{path}'; make one with llama-imatrix, or leave it out"
        )
    try:
        with path.open("rb") as file:
            binary = file.read(4) != b"GGUF"
        entries = _binary_entries(path.read_bytes()) if binary else _gguf_entries(path)
    except Exception as error:  # gguf's reader raises whatever a damaged file makes it stumble on
        raise QuantizationError(
            f"'{path}' is no importance matrix that can be read ({error}); make it again with "
            "llama-imatrix, or leave it out and calibrate here"
        ) from error
    for name, values in entries.items():
        if not (values.isfinite() & (values >= 0)).all():
            raise QuantizationError(f"'{path}' holds negative or non-finite values for {name}")
    return entries


def _gguf_entries(path: Path) -> Entries:
    """Sums over counts; where no token came by, ones, which is how llama-quantize reads it."""
    import gguf

    reader = gguf.GGUFReader(path)
    kind = reader.fields.get(gguf.Keys.General.TYPE)
    if kind is None or kind.contents() != gguf.GGUFType.IMATRIX:
        raise ValueError("a GGUF file of another type")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    entries = {}
    for name, sums in tensors.items():
        if name.endswith(".in_sum2"):
            counts = tensors[name.removesuffix("in_sum2") + "counts"].reshape(-1, 1)
            means = sums.reshape(len(counts), -1) / counts.clamp(min=1)
            entries[name.removesuffix(".in_sum2")] = torch.where(counts > 0, means, 1.0)
    return entries


def _binary_entries(data: bytes) -> Entries:
    """Little endian: the number of entries; each with its name, calls, values and their number."""
    place = 0

    def take(size: int) -> bytes:
        nonlocal place
        if size < 0 or place + size > len(data):
            raise ValueError(f"it ends at byte {len(data)}, within an entry")
        place += size
        return data[place - size : place]

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries = {}
    for _ in range(integer()):
        name = take(integer()).decode()
        calls = max(integer(), 1)
        values = np.frombuffer(take(4 * integer()), "<f4").astype(np.float32)
        entries[name] = torch.from_numpy(values) / calls
    return entries
