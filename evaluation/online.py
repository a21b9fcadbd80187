"""What is quantized while a model runs: rows are rounded in the graph, gradients go straight through."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quantization.errors import MeasurementError


class Written(NamedTuple):
    """A tensor that a pass has rounded, or might have.

    Args:
        exact: before that.
        kept: the same in the graph of the pass, to differentiate by.
    """

    exact: Tensor
    kept: Tensor


def check_finite(states: Tensor, what: str) -> None:
    """Raise `MeasurementError` for NaN and infinity, which no scale holds."""
    if not bool(states.isfinite().all()):
        raise MeasurementError(f"NaN or infinity in the {what} of a candidate; try --dtype float32")


def straight_through(states: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Rounded states, whose gradient is that of the states."""
    if not torch.is_grad_enabled():
        return rounding(states)
    with torch.no_grad():
        shift = rounding(states) - states
    return states + shift
