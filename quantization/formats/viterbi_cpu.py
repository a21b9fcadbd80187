"""Viterbi's algorithm for CPUs, compiled by numba: eight sequences are a vector register wide.

What it does and the letters are in `viterbi.py`. The eight lanes are written out because only so
does LLVM put them into one register; choices aren't stored but found again on the way back.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numba import config
from numpy.typing import NDArray
from torch import Tensor

from quantization.formats.viterbi import IMPOSSIBLE

LANES = 8

Floats = NDArray[np.float32]


def nearest_ring(wanted_ST: Tensor, weights_ST: Tensor, table: Tensor, bits: int) -> Tensor:
    """See `viterbi.nearest_ring`; as many threads as torch has."""
    sequences, steps = wanted_ST.shape
    groups = -(-sequences // LANES)
    laid = np.zeros((2, groups * LANES, steps), np.float32)
    laid[0, :sequences], laid[1, :sequences] = wanted_ST.numpy(), weights_ST.numpy()
    x, w = np.ascontiguousarray(laid.reshape(2, groups, LANES, steps).swapaxes(2, 3))
    symbols = np.empty((groups, steps, LANES), np.uint8)
    values = table.numpy()
    threads = min(torch.get_num_threads(), groups)

    def work(first: int) -> None:
        costs = np.empty((steps + 1, len(values) >> bits, LANES), np.float32)
        for group in range(first, groups, threads):
            _ring(x[group], w[group], values, bits, costs, symbols[group])

    if threads == 1:
        work(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    laid_out = symbols.swapaxes(1, 2).reshape(-1, steps)[:sequences]
    return torch.from_numpy(np.ascontiguousarray(laid_out))


def _jit(function: Any) -> Any:
    """Compiled when it is first called, without Python's lock."""
    return numba.njit(nogil=True, fastmath={"reassoc", "nsz", "contract"}, error_model="numpy")(
        function
    )


config.SLP_VECTORIZE = 1  # numba leaves it off, and scalar lanes are a fifth as fast


@_jit
def _forward(x: Floats, w: Floats, table: Floats, bits: int, costs: Floats) -> None:
    """Fill `costs` ((T + 1) x N x lanes), whose first row is given."""
    symbols = 1 << bits
    memories = costs.shape[1]
    shorter = memories >> bits
    for t in range(len(x)):
        x0, x1, x2, x3 = x[t, 0], x[t, 1], x[t, 2], x[t, 3]
        x4, x5, x6, x7 = x[t, 4], x[t, 5], x[t, 6], x[t, 7]
        w0, w1, w2, w3 = w[t, 0], w[t, 1], w[t, 2], w[t, 3]
        w4, w5, w6, w7 = w[t, 4], w[t, 5], w[t, 6], w[t, 7]
        old, new = costs[t], costs[t + 1]
        for m in range(memories):
            a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = np.float32(3e38)
            for h in range(symbols):
                v = table[h * memories + m]
                i = h * shorter + (m >> bits)
                a0 = min(a0, old[i, 0] + w0 * (x0 - v) * (x0 - v))
                a1 = min(a1, old[i, 1] + w1 * (x1 - v) * (x1 - v))
                a2 = min(a2, old[i, 2] + w2 * (x2 - v) * (x2 - v))
                a3 = min(a3, old[i, 3] + w3 * (x3 - v) * (x3 - v))
                a4 = min(a4, old[i, 4] + w4 * (x4 - v) * (x4 - v))
                a5 = min(a5, old[i, 5] + w5 * (x5 - v) * (x5 - v))
                a6 = min(a6, old[i, 6] + w6 * (x6 - v) * (x6 - v))
                a7 = min(a7, old[i, 7] + w7 * (x7 - v) * (x7 - v))
            new[m, 0], new[m, 1], new[m, 2], new[m, 3] = a0, a1, a2, a3
            new[m, 4], new[m, 5], new[m, 6], new[m, 7] = a4, a5, a6, a7


@_jit
def _backward(
    x: Floats,
    w: Floats,
    table: Floats,
    bits: int,
    costs: Floats,
    ends: NDArray[np.int64],
    symbols: NDArray[np.uint8],
) -> None:
    """Fill `symbols` (T x lanes) with the paths that end in the memories `ends`."""
    memories = costs.shape[1]
    shorter = memories >> bits
    for lane in range(LANES):
        m = ends[lane]
        for t in range(len(x) - 1, -1, -1):
            symbols[t, lane] = m & ((1 << bits) - 1)
            best, chosen = np.float32(3e38), 0
            for h in range(1 << bits):
                away = x[t, lane] - table[h * memories + m]
                cost = costs[t, h * shorter + (m >> bits), lane] + w[t, lane] * away * away
                if cost < best:
                    best, chosen = cost, h
            m = chosen * shorter + (m >> bits)


@_jit
def _ring(
    x: Floats, w: Floats, table: Floats, bits: int, costs: Floats, symbols: NDArray[np.uint8]
) -> None:
    """Fill `symbols` (T x lanes) of eight rings."""
    steps, memories = len(x), costs.shape[1]
    half = steps // 2
    turned_x, turned_w = np.concatenate((x[half:], x[:half])), np.concatenate((w[half:], w[:half]))
    costs[0] = 0
    _forward(turned_x, turned_w, table, bits, costs)
    ends = np.empty(LANES, np.int64)
    for lane in range(LANES):
        ends[lane] = np.argmin(costs[steps, :, lane])
    _backward(turned_x, turned_w, table, bits, costs, ends, symbols)
    for lane in range(LANES):
        ends[lane] = 0
        for t in range(steps - half):
            ends[lane] = ((ends[lane] << bits) | symbols[t, lane]) & (memories - 1)
    costs[0] = IMPOSSIBLE
    for lane in range(LANES):
        costs[0, ends[lane], lane] = 0
    _forward(x, w, table, bits, costs)
    _backward(x, w, table, bits, costs, ends, symbols)
