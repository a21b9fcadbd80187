"""How long llama.cpp's own kernels take for a matrix product, measured one shape and type at a time.

A measurement is a graph of many equal products, each with a weight of its own, in the buffer type
(repacked or not) and with the threads that llama.cpp would use for them: together they don't stay
in the caches that a token's other weights would have emptied. Between the cells a reference product
is timed again and again, and a cell's time is told in its terms, so that a machine that slows down
for a while slows both.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from engines.base import Cell, Timing
from engines.llama_library import llama
from engines.llama_runs import noise
from engines.turns import seconds_of, timing_beside, usual_of
from quantization.errors import EngineError, KernelError
from quantization.formats.gguf import TYPES

F32, CPU = 0, 0
WORKING_SET_BYTES = 96 * 2**20  # more than second-level caches; a small model's weights
MOST_COPIES = 512
MOST_OPERATIONS = 4e9  # of one pass; a long prompt keeps its weight in the caches anyway
BUFFER_OFFSET = 8  # of ggml_tensor.buffer
c_void, c_long = ctypes.c_void_p, ctypes.c_int64


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", c_void), ("no_alloc", ctypes.c_bool))


@cache
def _ggml() -> ctypes.CDLL:
    found = llama()
    types: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (c_void, [_InitParams]),
        "ggml_free": (None, [c_void]),
        "ggml_tensor_overhead": (ctypes.c_size_t, []),
        "ggml_graph_overhead_custom": (ctypes.c_size_t, [ctypes.c_size_t, ctypes.c_bool]),
        "ggml_new_graph_custom": (c_void, [c_void, ctypes.c_size_t, ctypes.c_bool]),
        "ggml_build_forward_expand": (None, [c_void, c_void]),
        "ggml_new_tensor_2d": (c_void, [c_void, ctypes.c_int, c_long, c_long]),
        "ggml_mul_mat": (c_void, [c_void, c_void, c_void]),
        "ggml_backend_cpu_init": (c_void, []),
        "ggml_backend_cpu_set_n_threads": (None, [c_void, ctypes.c_int]),
        "ggml_backend_free": (None, [c_void]),
        "ggml_backend_graph_compute": (ctypes.c_int, [c_void, c_void]),
        "ggml_backend_tensor_set": (None, [c_void, c_void, ctypes.c_size_t, ctypes.c_size_t]),
        "ggml_backend_cpu_buffer_type": (c_void, []),
        "ggml_backend_alloc_ctx_tensors_from_buft": (c_void, [c_void, c_void]),
        "ggml_backend_buft_alloc_buffer": (c_void, [c_void, ctypes.c_size_t]),
        "ggml_backend_buffer_free": (None, [c_void]),
        "ggml_backend_dev_by_type": (c_void, [ctypes.c_int]),
        "ggml_backend_dev_backend_reg": (c_void, [c_void]),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, [c_void, c_void]),
        "ggml_backend_reg_get_proc_address": (c_void, [c_void, ctypes.c_char_p]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def time_products(
    cells: Sequence[Cell], beside: Cell, threads: int, usual_s: float | None = None
) -> list[Timing]:
    """Time products of packed weights, each in terms of a reference that is timed beside it.

    Args:
        cells: shapes, ggml types and numbers of activation rows.
        beside: the reference.
        threads: of each product.
        usual_s: what the reference usually takes; by default what it takes now.

    Raises:
        KernelError: a type that ggml doesn't know.
        EngineError: no llama.cpp, or no memory for a cell.
    """
    with _products(beside, threads) as reference:
        usual = usual_s or usual_of(reference.seconds)
        return [_timing(cell, threads, reference, usual) for cell in cells]


def _timing(cell: Cell, threads: int, reference: "_Graph", usual_s: float) -> Timing:
    with _products(cell, threads) as graph:
        return timing_beside(graph.seconds, reference.seconds, usual_s)


@dataclass
class _Graph:
    """Products that are ready to run."""

    backend: int
    graph: int
    copies: int

    def run(self) -> None:
        if status := _ggml().ggml_backend_graph_compute(self.backend, self.graph):
            raise EngineError(f"ggml could not compute a product (status {status})")

    def seconds(self) -> float:
        """Seconds of one product."""
        return seconds_of(self.run) / self.copies


@contextmanager
def _products(cell: Cell, threads: int) -> Iterator[_Graph]:
    """A graph of products, each with its own copy of a weight."""
    ggml, copies = _ggml(), _copies(cell)
    if cell.kernel not in TYPES:
        raise KernelError(f"ggml has no type '{cell.kernel}'; known: {', '.join(TYPES)}")
    number, (rows, columns) = TYPES[cell.kernel].number, cell.shape
    with ExitStack() as stack:
        backend = ggml.ggml_backend_cpu_init()
        stack.callback(ggml.ggml_backend_free, backend)
        ggml.ggml_backend_cpu_set_n_threads(backend, threads)
        tensors = ggml.ggml_tensor_overhead()
        weights = _context(stack, (copies + 1) * tensors)
        size = 2 * copies + 8
        rest = _context(stack, size * tensors + ggml.ggml_graph_overhead_custom(size, False))
        matrices = [ggml.ggml_new_tensor_2d(weights, number, columns, rows) for _ in range(copies)]
        inputs = ggml.ggml_new_tensor_2d(rest, F32, columns, cell.batch)
        graph = ggml.ggml_new_graph_custom(rest, size, False)
        for matrix in matrices:
            ggml.ggml_build_forward_expand(graph, ggml.ggml_mul_mat(rest, matrix, inputs))
        for context, kind in ((weights, _buffer_type(number, columns, rows)), (rest, None)):
            _allocate(stack, context, kind or ggml.ggml_backend_cpu_buffer_type(), cell)
        _fill(cell, matrices, inputs)
        found = _Graph(backend, graph, copies)
        found.run()  # the first finds pages missing
        yield found


def _copies(cell: Cell) -> int:
    rows, columns = cell.shape
    nbytes = rows * TYPES[cell.kernel].row_bytes(columns) if cell.kernel in TYPES else 1
    operations = 2 * rows * columns * cell.batch
    most = min(WORKING_SET_BYTES // nbytes, MOST_OPERATIONS // operations, MOST_COPIES)
    return max(1, int(most))


def _context(stack: ExitStack, nbytes: int) -> int:
    context = _ggml().ggml_init(_InitParams(nbytes, None, True))
    stack.callback(_ggml().ggml_free, context)
    return int(context)


def _allocate(stack: ExitStack, context: int, kind: int, cell: Cell) -> None:
    buffer = _ggml().ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
    if not buffer:
        raise EngineError(f"no memory to time {cell.kernel} {cell.shape} x {cell.batch}")
    stack.callback(_ggml().ggml_backend_buffer_free, buffer)


def _buffer_type(number: int, columns: int, rows: int) -> int | None:
    """The first of the CPU's extra buffer types that takes the product, as llama.cpp chooses.

    See `select_weight_buft` in its src/llama-model-loader.cpp: these hold repacked weights.
    """
    ggml = _ggml()
    device = ggml.ggml_backend_dev_by_type(CPU)
    address = ggml.ggml_backend_reg_get_proc_address(
        ggml.ggml_backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
    )
    if not address:
        return None
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(c_void), c_void)(address)(device)
    for kind in _until_null(kinds):
        with ExitStack() as stack:
            context = _context(stack, 8 * ggml.ggml_tensor_overhead())
            weight = ggml.ggml_new_tensor_2d(context, number, columns, rows)
            inputs = ggml.ggml_new_tensor_2d(context, F32, columns, 512)
            product = ggml.ggml_mul_mat(context, weight, inputs)
            empty = ggml.ggml_backend_buft_alloc_buffer(kind, 0)
            stack.callback(ggml.ggml_backend_buffer_free, empty)
            c_void.from_address(weight + BUFFER_OFFSET).value = empty
            if ggml.ggml_backend_dev_supports_op(device, product):
                return kind
    return None


def _until_null(pointers: Any) -> Iterator[int]:
    index = 0
    while pointers and pointers[index]:
        yield pointers[index]
        index += 1


def _fill(cell: Cell, matrices: Sequence[int], inputs: int) -> None:
    ggml, packed = _ggml(), noise(cell.kernel, cell.shape)
    for matrix in matrices:
        ggml.ggml_backend_tensor_set(matrix, packed.ctypes.data, 0, packed.nbytes)
    shape = (cell.batch, cell.shape[1])
    activations = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    ggml.ggml_backend_tensor_set(inputs, activations.ctypes.data, 0, activations.nbytes)
