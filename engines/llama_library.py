"""llama.cpp itself, out of the xllamacpp wheel, through its C interface.

Only what Bitfront needs: load a GGUF file, feed it tokens, look at logits, and time both. C
structures are declared as this build of llama.cpp has them; its own defaults are compared with the
declaration before anything is passed (`_checked`), since a field that moved would go unnoticed.
"""

import ctypes
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from quantization.errors import EngineError
from quantization.formats.gguf import TYPES, ggml

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

F16 = 1
c_int, c_uint, c_float, c_void = ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_void_p


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", c_void),
        ("tensor_buft_overrides", c_void),
        ("n_gpu_layers", c_int),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int),
        ("tensor_split", c_void),
        ("progress_callback", c_void),
        ("progress_callback_user_data", c_void),
        ("kv_overrides", c_void),
        ("flags", ctypes.c_bool * 6),
        ("room", ctypes.c_ubyte * 256),  # later builds may append
    )


class _ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", c_uint),
        ("n_batch", c_uint),
        ("n_ubatch", c_uint),
        ("n_seq_max", c_uint),
        ("n_rs_seq", c_uint),
        ("n_outputs_max", c_uint),
        ("n_outputs_max_per_seq", c_uint),
        ("n_threads", c_int),
        ("n_threads_batch", c_int),
        ("kinds", c_int * 5),
        ("rope_and_yarn", c_float * 6),
        ("yarn_orig_ctx", c_uint),
        ("defrag_thold", c_float),
        ("cb_eval", c_void),
        ("cb_eval_user_data", c_void),
        ("type_k", c_int),
        ("type_v", c_int),
        ("room", ctypes.c_ubyte * 256),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int),
        ("token", c_void),
        ("embd", c_void),
        ("pos", c_void),
        ("n_seq_id", c_void),
        ("seq_id", c_void),
        ("logits", c_void),
    )


@cache
def llama() -> ctypes.CDLL:
    """The library with its functions' types set, its log silenced.

    Raises:
        EngineError: it isn't installed, or its structures aren't those declared here.
    """
    found = ggml()
    types: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (_ModelParams, []),
        "llama_context_default_params": (_ContextParams, []),
        "llama_model_load_from_file": (c_void, [ctypes.c_char_p, _ModelParams]),
        "llama_init_from_model": (c_void, [c_void, _ContextParams]),
        "llama_model_free": (None, [c_void]),
        "llama_free": (None, [c_void]),
        "llama_model_get_vocab": (c_void, [c_void]),
        "llama_vocab_n_tokens": (c_int, [c_void]),
        "llama_model_size": (ctypes.c_uint64, [c_void]),
        "llama_get_memory": (c_void, [c_void]),
        "llama_memory_clear": (None, [c_void, ctypes.c_bool]),
        "llama_state_seq_get_size": (ctypes.c_size_t, [c_void, c_int]),
        "llama_state_seq_get_data": (ctypes.c_size_t, [c_void, c_void, ctypes.c_size_t, c_int]),
        "llama_state_seq_set_data": (ctypes.c_size_t, [c_void, c_void, ctypes.c_size_t, c_int]),
        "llama_batch_get_one": (_Batch, [c_void, c_int]),
        "llama_decode": (c_int, [c_void, _Batch]),
        "llama_synchronize": (None, [c_void]),
        "llama_get_logits_ith": (ctypes.POINTER(c_float), [c_void, c_int]),
        "llama_tokenize": (
            c_int,
            [c_void, ctypes.c_char_p, c_int, c_void, c_int, ctypes.c_bool, ctypes.c_bool],
        ),
        "llama_print_system_info": (ctypes.c_char_p, []),
        "llama_log_set": (None, [c_void, c_void]),
    }
    try:
        for name, (result, arguments) in types.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise EngineError(
            f"this xllamacpp ({version('xllamacpp')}) lacks a function of llama.cpp ({error}); "
            "install the one that bitfront[llama] names"
        ) from error
    found.llama_log_set(ctypes.cast(_silence, c_void), None)
    _checked(found)
    found.llama_backend_init()
    return found


def _ignore(_level: int, _text: bytes, _data: int) -> None:
    """llama.cpp tells all it does; its refusals come as return values."""


_silence = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void)(_ignore)


def _checked(found: ctypes.CDLL) -> None:
    """Refuse a build whose structures differ from those declared above."""
    model, context = found.llama_model_default_params(), found.llama_context_default_params()
    head = (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max)
    seen = (head, context.type_k, context.type_v, tuple(model.flags)[:5], model.n_gpu_layers)
    known = ((512, 2048, 512, 1), F16, F16, (False, False, True, False, False), -1)
    if seen != known or not 1 <= context.n_threads == context.n_threads_batch <= 512:
        raise EngineError(
            f"xllamacpp {version('xllamacpp')} has another layout of parameters than the one this "
            "was written for; install the version that bitfront's constraints.txt names"
        )


def kernel_version() -> str:
    """What times depend on beside the machine: the wheel and what it was compiled for."""
    info = llama().llama_print_system_info().decode()
    features = "+".join(sorted(p.split(" = ")[0].strip() for p in info.split("|") if "= 1" in p))
    return f"xllamacpp {version('xllamacpp')} {features}".replace("CPU : ", "")


class LlamaVocab:
    """Only the vocabulary of a GGUF file. Use it in a `with`.

    Raises:
        EngineError: llama.cpp refuses the file.
    """

    def __init__(self, path: Path) -> None:
        params = llama().llama_model_default_params()
        params.flags[0] = True  # vocab_only
        self._model = _load(path, params)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        llama().llama_model_free(self._model)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without what is put in front of it."""
        return _tokenize(self._model, text)


def _load(path: Path, params: _ModelParams) -> int:
    model = llama().llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise EngineError(
            f"llama.cpp can't load '{path}' ({path.stat().st_size if path.exists() else 0:,} "
            "bytes): it is damaged, or of a kind that this build doesn't know"
        )
    return int(model)


def _tokenize(model: int, text: str) -> list[int]:
    data = text.encode()
    room = np.empty(len(data) + 8, dtype=np.int32)
    vocab = llama().llama_model_get_vocab(model)
    count = llama().llama_tokenize(
        vocab, data, len(data), room.ctypes.data, len(room), False, False
    )  # without special tokens, in front or named in the text
    return [int(i) for i in room[: max(count, 0)]]


PLAIN_CACHE = ("f16", "f16")
CACHE_TYPES = {"f16": F16, **{name: kind.number for name, kind in TYPES.items()}}


class LlamaModel:
    """A GGUF file in llama.cpp's hands, with one context. Use it in a `with`.

    Args:
        path: the file.
        threads: of prompt processing and generation.
        context: tokens that its KV cache holds.
        batch: tokens that are processed at once.
        caches: ggml's types of the cache's keys and values.
        sequences: side by side, each with a cache of its own.

    Raises:
        EngineError: llama.cpp refuses the file, or has no memory for it.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        context: int = 1024,
        batch: int = 512,
        caches: tuple[str, str] = PLAIN_CACHE,
        sequences: int = 1,
    ) -> None:
        self._llama = llama()
        self.threads, self.caches, self.sequences = threads, caches, sequences
        model = self._llama.llama_model_default_params()
        model.n_gpu_layers = 0  # this is the engine of the processor
        self._model = _load(path, model)
        params = self._llama.llama_context_default_params()
        whole = context * sequences
        params.n_ctx, params.n_batch, params.n_ubatch = whole, whole, min(batch, whole)
        params.n_seq_max = sequences
        params.n_outputs_max_per_seq = 0
        params.n_threads = params.n_threads_batch = self.threads
        if caches != PLAIN_CACHE:
            params.type_k, params.type_v = (CACHE_TYPES[name] for name in caches)
        self._context = self._llama.llama_init_from_model(self._model, params)
        if not self._context:
            self._llama.llama_model_free(self._model)
            raise EngineError(f"llama.cpp has no memory for {whole} tokens of context")
        self._vocab = self._llama.llama_model_get_vocab(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, as llama.cpp counts them; a tied head is counted twice."""
        return int(self._llama.llama_model_size(self._model))

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return int(self._llama.llama_vocab_n_tokens(self._vocab))

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without what is put in front of it."""
        return _tokenize(self._model, text)

    def logits(self, ids: Sequence[int] | Ids) -> Floats:
        """Logits of all tokens of one sequence, tokens x vocabulary."""
        self._clear()
        tokens = np.asarray(ids, dtype=np.int32)
        wanted = np.ones(len(tokens), dtype=np.int8)
        batch = self._llama.llama_batch_get_one(tokens.ctypes.data, len(tokens))
        batch.logits = wanted.ctypes.data
        self._decode(batch)
        rows = [self._llama.llama_get_logits_ith(self._context, i) for i in range(len(tokens))]
        if not all(rows):
            raise EngineError("llama.cpp kept no logits for some tokens; this is a bug")
        return np.stack([np.ctypeslib.as_array(row, (self.vocab,)).copy() for row in rows])

    def prefill_s(self, tokens: int, repeats: int = 1) -> list[float]:
        """Seconds in which a prompt of so many tokens is processed by each sequence, each time anew."""
        ids = np.arange(10, 10 + tokens, dtype=np.int32) % self.vocab
        found = []
        for _ in range(repeats):
            self._clear()
            found.append(self._decode_s(np.tile(ids, self.sequences)))
        return found

    def fill(self, tokens: int) -> None:
        """Put so many tokens into the KV cache of the first sequence, and nothing into the others'."""
        self._clear()
        ids = np.arange(10, 10 + tokens, dtype=np.int32) % self.vocab
        self._decode(self._llama.llama_batch_get_one(ids.ctypes.data, tokens))

    def state(self) -> NDArray[np.uint8]:
        """The KV cache of the first sequence, for other models of the same shape and batch."""
        size = self._llama.llama_state_seq_get_size(self._context, 0)
        data = np.empty(size, dtype=np.uint8)
        self._llama.llama_state_seq_get_data(self._context, data.ctypes.data, size, 0)
        return data

    def restore(self, state: NDArray[np.uint8]) -> None:
        """Take over a KV cache, for all sequences; `step_s` goes on behind it.

        Raises:
            EngineError: it is of a model of another shape.
        """
        self._clear()
        for sequence in range(self.sequences):
            if not self._llama.llama_state_seq_set_data(
                self._context, state.ctypes.data, state.nbytes, sequence
            ):
                raise EngineError("llama.cpp doesn't take a KV cache from a model of another shape")

    def step_s(self) -> float:
        """Seconds of one more token of each sequence."""
        return self._decode_s(np.full(self.sequences, 10, dtype=np.int32))

    def _decode_s(self, ids: NDArray[np.int32]) -> float:
        """Seconds of tokens, as many for each sequence, one sequence after another."""
        batch = self._llama.llama_batch_get_one(ids.ctypes.data, len(ids))
        if self.sequences > 1:  # positions go on where each sequence's cache ends
            each = len(ids) // self.sequences
            whose = np.repeat(np.arange(self.sequences, dtype=np.int32), each)
            places = whose.ctypes.data + whose.itemsize * np.arange(len(ids), dtype=np.uint64)
            one, wanted = np.ones(len(ids), dtype=np.int32), np.zeros(len(ids), dtype=np.int8)
            wanted[each - 1 :: each] = 1
            batch.n_seq_id, batch.seq_id = one.ctypes.data, places.ctypes.data
            batch.logits = wanted.ctypes.data
        start = time.perf_counter()
        self._decode(batch)
        self._llama.llama_synchronize(self._context)
        return time.perf_counter() - start

    def _clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def _decode(self, batch: _Batch) -> None:
        if code := self._llama.llama_decode(self._context, batch):
            raise EngineError(
                f"llama.cpp could not process {batch.n_tokens} tokens (status {code}); "
                "the context is too short for them, or memory ran out"
            )
