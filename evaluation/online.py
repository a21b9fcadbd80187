"""What is quantized while a model runs: rows are rounded in the graph, gradients go straight through."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quantization.activations import rounded
from quantization.errors import MeasurementError, QuantizationError
from quantization.formats import Format


class Written(NamedTuple):
    """A tensor that a pass has rounded, or might have.

    Args:
        exact: before that.
        kept: the same in the graph of the pass, to differentiate by.
    """

    exact: Tensor
    kept: Tensor


def round_online(states: Tensor, format: Format, what: str) -> Tensor:
    """States as a format gives them back.

    Raises:
        MeasurementError: NaN, infinity, or numbers that no scale of the format reaches: the candidate
            is broken, and others aren't.
    """
    try:
        return rounded(states, format)
    except QuantizationError as error:
        raise MeasurementError(
            f"{what} of a candidate can't be kept in {format.name} ({error}); if others fail, too, "
            "try --dtype float32"
        ) from error


def straight_through(states: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Rounded states, whose gradient is that of the states."""
    if not torch.is_grad_enabled():
        return rounding(states)
    with torch.no_grad():
        shift = rounding(states) - states
    return states + shift
