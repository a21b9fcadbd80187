"""What is quantized while a model runs: rows are rounded in the graph, gradients go straight through."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

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


class Watching:
    """Notes what passes round, by key, for whoever watches."""

    def __init__(self) -> None:
        self._watched: Mapping[Any, list[Written]] = {}

    @contextmanager
    def watch(self, seen: Mapping[Any, list[Written]]) -> Iterator[None]:
        """Note into these lists what the passes within round."""
        self._watched, before = seen, self._watched
        try:
            yield
        finally:
            self._watched = before


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
