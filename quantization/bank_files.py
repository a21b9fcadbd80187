"""Files of a bank: an entry's values or packed bytes, and the codes that lie beside some values."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from quantization.errors import BankError
from quantization.formats import Format, Packed, Rotated
from quantization.kernels.packed_weight import PackedWeight


def read_entry(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """A file's parameters; packed ones as tensors that dequantize when they are looked at."""
    try:
        # they are kept, also for passes that differentiate after a measurement has read them
        with torch.inference_mode(mode=False), safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            described = json.loads((file.metadata() or {}).get("packed", "{}"))
    except Exception as error:  # safetensors raises its own type for damaged files
        raise BankError(
            f"can't read '{path}' ({error}); remove it and run the same command again"
        ) from error
    for parameter, (name, shape, transposed) in described.items():
        mark = f"{parameter}|"
        own = {n.removeprefix(mark): tensors.pop(n) for n in list(tensors) if n.startswith(mark)}
        packed = Packed(name, tuple(shape), own)
        tensors[parameter] = PackedWeight(packed, dtype, transposed)
    return tensors


def is_joint(format: Format) -> bool:
    """Whether values rounded to 16 bits may be those of other codes, too, or nearly."""
    return isinstance(format, Rotated) and format.inner.joint


def codes_path(path: Path) -> Path:
    """Where the codes of joint formats lie, beside their values."""
    return path.with_name(f"{path.stem}-codes{path.suffix}")
