"""Whole models in llama.cpp, timed: what a map costs end to end.

Times don't depend on values, so the weights are noise, packed once a shape and type: a file of any
map is written as fast as the disk takes it.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.base import Run
from engines.gguf_file import F32, Stored, write_gguf
from engines.llama_library import LlamaModel, llama
from quantization.checkpoints import Checkpoint
from quantization.formats.gguf import TYPES
from quantization.units import Layout

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 -- a folder of our own is made in it


@contextmanager
def opened(
    checkpoint: Checkpoint,
    layout: Layout,
    kernels: Mapping[str, str],
    others: Mapping[str, tuple[int, ...]],
    threads: int,
    context: int,
) -> Iterator[LlamaModel]:
    """A model of noise in llama.cpp.

    Args:
        checkpoint: whose configuration and tokenizer it has.
        layout: its units.
        kernels: ggml's type for each parameter of a unit.
        others: shapes of the parameters outside units.
        threads: of the CPU.
        context: tokens that the KV cache holds.

    Raises:
        EngineError: llama.cpp refuses.
        ExportError: a model that GGUF files don't know.
    """
    tensors = [
        Stored(site.parameter, type, site.shape, _reader(type, site.shape))
        for unit in layout.units
        for site in unit.stored
        for type in (kernels[site.parameter],)
    ]
    tensors += [Stored(name, F32, shape, _ones(shape)) for name, shape in others.items()]
    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place, prefix="bitfront-") as folder:
        path = Path(folder, "model.gguf")
        write_gguf(path, checkpoint, tensors)
        with LlamaModel(path, threads, context, min(context, 512)) as model:
            path.unlink()  # it is mapped or read by now
            yield model


def time_run(model: LlamaModel, prompt: int, past: int, tokens: int, repeats: int) -> Run:
    """Time prompt processing and generation.

    Args:
        model: in llama.cpp.
        prompt: tokens of the prompt.
        past: tokens in the KV cache when generation starts.
        tokens: how many are generated.
        repeats: of the prompt; the first, which warms up, isn't counted.
    """
    prefill = model.prefill_s(prompt, repeats + 1)[1:] if repeats else []
    return Run(tuple(prefill), tuple(model.decode_s(tokens, past)))


Read = Callable[[], NDArray[np.uint8]]


def _reader(type: str, shape: tuple[int, ...]) -> Read:
    return lambda: noise(type, shape)


def _ones(shape: tuple[int, ...]) -> Read:
    return lambda: np.ones(shape, dtype=np.float32).view(np.uint8)


@cache
def noise(type: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Normal numbers as ggml packs them (rows x row bytes): subnormal ones would be slow."""
    rows, columns = shape
    kind = TYPES[type]
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32) / columns**0.5
    packed = np.empty((rows, kind.row_bytes(columns)), dtype=np.uint8)
    importance = np.ones(columns, dtype=np.float32)
    llama().ggml_quantize_chunk(
        kind.number, values.ctypes.data, packed.ctypes.data, 0, rows, columns,
        importance.ctypes.data if kind.imatrix == "required" else None,
    )  # fmt: skip
    return packed
