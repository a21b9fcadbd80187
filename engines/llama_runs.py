"""Whole models in llama.cpp, timed: what a map costs end to end.

Times don't depend on values, so the weights are noise, packed once a shape and type: a file of any
map is written as fast as the disk takes it.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.base import Exercise, Run
from engines.gguf_file import F32, Stored, parts_of, write_gguf
from engines.llama_library import PLAIN_CACHE, LlamaModel, llama
from engines.power import Counter
from engines.turns import joules_of
from quantization.checkpoints import Checkpoint
from quantization.formats.gguf import TYPES
from quantization.units import Layout
from quantization.weights import open_weights

LEAST_PROMPTS, MOST_PROMPTS, ENOUGH_S = 3, 8, 6.0
"""Pairs of prompts that count: as many as fit into some seconds."""
WARM_UP = 4
"""Tokens that don't count."""
FEW_ROWS = 256
ROOM = 8
"""Files of shared memory are memory: it must have room for so many times the file."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 -- a folder of our own is made in it


@contextmanager
def opened(
    checkpoint: Checkpoint,
    layout: Layout,
    kernels: Mapping[str, str],
    *,
    others: Mapping[str, tuple[int, ...]],
    threads: int,
    context: int,
    caches: tuple[str, str] = PLAIN_CACHE,
    sequences: int = 1,
) -> Iterator[LlamaModel]:
    """A model of noise in llama.cpp.

    Args:
        checkpoint: whose configuration and tokenizer it has.
        layout: its units.
        kernels: ggml's type for each parameter of a unit.
        others: shapes of the parameters outside units.
        threads: of the CPU.
        context: tokens that the KV cache of a sequence holds.
        caches: ggml's types of its keys and values.
        sequences: side by side.

    Raises:
        EngineError: llama.cpp refuses.
        ExportError: a model that GGUF files don't know.
    """
    tensors = [
        Stored(name, type, shape, _reader(type, shape))
        for unit in layout.units
        for site in unit.stored
        for type in (kernels[site.parameter],)
        for name, shape, _ in parts_of(site)
    ]
    tensors += [Stored(name, F32, shape, _ones(shape)) for name, shape in others.items()]
    place = _place(sum(tensor.nbytes for tensor in tensors))
    with tempfile.TemporaryDirectory(dir=place, prefix="bitfront-") as folder:
        path = Path(folder, "model.gguf")
        write_gguf(path, checkpoint, tensors, vocabulary=False)
        with LlamaModel(path, threads, context, min(context, 512), caches, sequences) as model:
            path.unlink()  # it is mapped or read by now
            yield model


def time_beside(
    checkpoint: Checkpoint,
    layout: Layout,
    kernels: Mapping[str, str],
    reference: Mapping[str, str],
    exercise: Exercise,
    caches: tuple[str, str],
    counter: Counter | None,
) -> tuple[Run, Run]:
    """See `Engine.time_map`; maps name ggml's type for each parameter, and the cache's two."""
    placed = {site.parameter for unit in layout.units for site in unit.stored}
    weights = open_weights(checkpoint)
    others = {name: tuple(weights[name].shape) for name in weights if name not in placed}
    context = max(exercise.prompt, exercise.past + exercise.generated + WARM_UP) + 1
    start = partial(
        opened, checkpoint, layout, others=others, threads=exercise.threads, context=context,
        sequences=exercise.batch,
    )  # fmt: skip
    with start(reference) as usual, start(kernels, caches=caches) as model:
        own, beside = _prompts(model, usual, exercise.prompt)
        states = [_cache(one, checkpoint.weights_hash, exercise.past) for one in (model, usual)]
        own_tokens, beside_tokens = _tokens((model, usual), states, exercise.generated)
        joules = joules_of(
            counter,
            lambda: model.prefill_s(exercise.prompt),
            lambda: model.restore(states[0]),
            model.step_s,
            exercise.generated,
        )
    return Run(own, own_tokens, *joules), Run(beside, beside_tokens)


def _prompts(
    model: LlamaModel, usual: LlamaModel, tokens: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A prompt of one, a prompt of the other, and so on; the first pair doesn't count."""
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(pairs) < 1 + LEAST_PROMPTS or (
        len(pairs) < 1 + MOST_PROMPTS and time.perf_counter() - start < ENOUGH_S
    ):
        pairs.append((model.prefill_s(tokens)[0], usual.prefill_s(tokens)[0]))
    return tuple(own for own, _ in pairs[1:]), tuple(beside for _, beside in pairs[1:])


def _tokens(
    pair: tuple[LlamaModel, LlamaModel], states: Sequence[NDArray[np.uint8]], count: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A token of one, a token of the other, and so on."""
    for one, state in zip(pair, states, strict=True):
        one.restore(state)
    model, usual = pair
    pairs = [(model.step_s(), usual.step_s()) for _ in range(WARM_UP + count)][WARM_UP:]
    return tuple(own for own, _ in pairs), tuple(beside for _, beside in pairs)


_caches: dict[tuple[object, ...], NDArray[np.uint8]] = {}
"""Filled KV caches of a process: what is in them doesn't matter, and filling them takes long."""
MOST_CACHES = 2


def _cache(model: LlamaModel, shape: str, past: int) -> NDArray[np.uint8]:
    key = shape, past, model.caches, model.sequences
    if key not in _caches:
        model.fill(past)
        for oldest in list(_caches)[: len(_caches) + 1 - MOST_CACHES]:
            del _caches[oldest]
        _caches[key] = model.state()
    return _caches[key]


def _place(nbytes: int) -> Path | None:
    """Shared memory where it has plenty of room, else wherever temporary files go."""
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > ROOM * nbytes:
        return SHARED_MEMORY
    return None


Read = Callable[[], NDArray[np.uint8]]


def _reader(type: str, shape: tuple[int, ...]) -> Read:
    return lambda: noise(type, shape)


def _ones(shape: tuple[int, ...]) -> Read:
    return lambda: np.ones(shape, dtype=np.float32).view(np.uint8)


def noise(type: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Normal numbers as ggml packs them (rows x row bytes): subnormal ones would be slow."""
    rows, columns = prod(shape[:-1]), shape[-1]
    few = _few(type, min(rows, FEW_ROWS), columns)
    packed = np.ascontiguousarray(np.tile(few, (-(-rows // len(few)), 1))[:rows])
    return packed.reshape(*shape[:-1], -1)


@cache
def _few(type: str, rows: int, columns: int) -> NDArray[np.uint8]:
    """Some rows; packing all of a large model's takes long, and values don't matter."""
    kind = TYPES[type]
    values = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    values /= columns**0.5
    packed = np.empty((rows, kind.row_bytes(columns)), dtype=np.uint8)
    importance = np.ones(columns, dtype=np.float32)
    llama().ggml_quantize_chunk(
        kind.number, values.ctypes.data, packed.ctypes.data, 0, rows, columns,
        importance.ctypes.data if kind.imatrix == "required" else None,
    )  # fmt: skip
    return packed
