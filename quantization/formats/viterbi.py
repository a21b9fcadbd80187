"""The nearest path through a bit-shift trellis: Viterbi's algorithm, closed into a ring.

A path is a ring of symbols of k bits each. Every L neighbouring bits are a state, every state has a
value, and so a step decides k bits and fits one number (QTIP, arXiv 2406.11235, section 3.1). Of
the states that share their last L - k bits only the cheapest matters to the steps that come.

The ends must meet. As in QTIP (algorithm 4) a first search runs around the ring from its middle,
with both ends free, and tells what the bits at the seam are; a second one is held to them.

Legend: S sequences, T steps, N = 2^(L-k) memories, B = 2^k symbols, J = N / B. State h * N + m
comes from memory h * J + m // B, by symbol m % B, and leaves memory m behind.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

STEP = 2**24  # costs that are kept at once

IMPOSSIBLE = 1e30


def nearest_ring(wanted_ST: Tensor, weights_ST: Tensor, table: Tensor, bits: int) -> Tensor:
    """Symbols (uint8, S x T) of the rings of least sum of w (x - value)^2.

    Args:
        wanted_ST: x, float32.
        weights_ST: w, float32, above zero.
        table: the values of all 2^L states, float32.
        bits: k, at most L / 2; T must be long enough for L bits.
    """
    if wanted_ST.device.type == "cpu" and (compiled := _compiled()):
        return compiled(wanted_ST, weights_ST, table, bits)
    memories = len(table) >> bits
    together = max(1, STEP // (memories * wanted_ST.shape[1]))
    pairs = zip(wanted_ST.split(together), weights_ST.split(together), strict=True)
    return torch.cat([_ring(x.T, w.T, table, bits) for x, w in pairs])


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor, int], Tensor] | None:
    """The search that numba compiles, some fifteen times as fast, where it can be had."""
    try:
        from quantization.formats import viterbi_cpu
    except ImportError:
        return None
    return viterbi_cpu.nearest_ring


def states(symbols: Tensor, bits: int, state_bits: int) -> Tensor:
    """The state (int32) after each step of rings that run along the last dimension."""
    symbols = symbols.int()
    found = symbols.clone()
    for back in range(1, -(-state_bits // bits)):
        found |= symbols.roll(back, -1) << (bits * back)
    return found & (2**state_bits - 1)


def _ring(wanted_TS: Tensor, weights_TS: Tensor, table: Tensor, bits: int) -> Tensor:
    steps = len(wanted_TS)
    half = steps // 2
    turned = wanted_TS.roll(-half, 0), weights_TS.roll(-half, 0)
    free = _backward(*turned, table, bits, _forward(*turned, table, bits, None), None)
    memory_bits = (len(table) >> bits).bit_length() - 1
    seam = states(free, bits, memory_bits)[:, steps - half - 1].long()
    held = wanted_TS, weights_TS, table, bits
    return _backward(*held, _forward(*held, seam), seam)


def _forward(
    wanted_TS: Tensor, weights_TS: Tensor, table: Tensor, bits: int, start_S: Tensor | None
) -> Tensor:
    """Least costs of all memories after 0 … T steps, (T + 1) x N x S."""
    steps, sequences = wanted_TS.shape
    table_HJB = table.view(2**bits, -1, 2**bits, 1)
    memories = table_HJB.shape[1] * table_HJB.shape[2]
    costs = wanted_TS.new_zeros(steps + 1, memories, sequences)
    if start_S is not None:
        costs[0] = IMPOSSIBLE
        costs[0].scatter_(0, start_S[None], 0.0)
    for step in range(steps):
        each = (wanted_TS[step] - table_HJB).square_().mul_(weights_TS[step])
        each += costs[step].view(*table_HJB.shape[:2], 1, sequences)
        torch.amin(each, 0, out=costs[step + 1].view(each.shape[1:]))
    return costs


def _backward(
    wanted_TS: Tensor,
    weights_TS: Tensor,
    table: Tensor,
    bits: int,
    costs: Tensor,
    end_S: Tensor | None,
) -> Tensor:
    """The symbols (uint8, S x T) of the cheapest path, whose choices the costs tell."""
    steps, sequences = wanted_TS.shape
    table_HN = table.view(2**bits, -1)
    memory = costs[steps].argmin(0) if end_S is None else end_S
    symbols = torch.empty(sequences, steps, dtype=torch.uint8, device=table.device)
    for step in reversed(range(steps)):
        symbols[:, step] = (memory % 2**bits).to(torch.uint8)
        away = (wanted_TS[step] - table_HN[:, memory]).square() * weights_TS[step]
        before = costs[step].view(2**bits, -1, sequences)
        shorter = (memory >> bits)[None, None].expand(2**bits, 1, -1)
        chosen = (before.gather(1, shorter)[:, 0] + away).argmin(0)
        memory = chosen * before.shape[1] + (memory >> bits)
    return symbols
