"""Which number type and device a worker computes with, and why."""

import os

import torch

from quantization.errors import MeasurementError

NATIVE_BF16 = ("amx_bf16", "avx512_bf16", "bf16")  # the last is ARM's
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory_bytes() -> int:
    """The memory that a bank has to fit into: the accelerator's, or the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_dtype(wanted: str = "auto") -> tuple[torch.dtype, str]:
    """The arithmetic type for measurements, with the reason.

    bfloat16 where the hardware multiplies it natively; emulated, it is slower than float32.
    """
    if wanted != "auto":
        if wanted not in DTYPES:
            raise MeasurementError(
                f"unknown arithmetic type '{wanted}'; known: auto, {', '.join(DTYPES)}"
            )
        return DTYPES[wanted], "asked for"
    if torch.cuda.is_available():
        if torch.cuda.get_device_capability() >= (8, 0):
            return torch.bfloat16, "the GPU multiplies bfloat16 natively"
        return torch.float32, "the GPU is too old for bfloat16"
    capabilities = torch.cpu.get_capabilities()
    if any(capabilities.get(name) for name in NATIVE_BF16):
        return torch.bfloat16, "the CPU multiplies bfloat16 natively"
    return torch.float32, "the CPU has no bfloat16 instructions"
