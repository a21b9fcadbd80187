"""Sharing the columns of a product between programs, where its result alone has too few tiles."""

from functools import cache

import torch
from torch import Tensor

WAVES = 2  # programs for each processor, so that one computes while another loads
INTERPRETED = 8  # processors to plan for where the interpreter stands in for a GPU


def parts_for(tiles: int, columns: int, step: int, device: torch.device) -> tuple[int, int]:
    """How many programs share the columns of a tile, and the columns of each (whole steps).

    Args:
        tiles: programs that there are without sharing.
        columns: of the weight.
        step: columns that a part is a multiple of.
        device: whose processors want work.
    """
    steps = -(-columns // step)
    wanted = max(1, min(steps, WAVES * _processors(device) // tiles))
    each = -(-steps // wanted)
    return -(-steps // each), each * step


def add_parts(parts: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of `parts` (parts x batch x rows, with `bias` in it already if it is one part)."""
    if len(parts) == 1:
        return parts[0]
    total = parts.sum(0)
    return (total if bias is None else total.add_(bias)).to(dtype)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
