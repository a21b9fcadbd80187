"""KV caches in a format: keys and values are quantized as they are written, and read back like that.

Every attention of a model hands new keys (rotated) and values to a cache and goes on with what that
gives back. A stand-in for the cache is passed to the attentions alone, so masks and positions stay
those of a pass without one. What is quantized is the row of one head of one token, each by itself,
as engines do it when a token arrives; every token then attends to quantized keys and values, its own
too.
"""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from evaluation.online import Watching, Written, round_online, straight_through
from quantization.activations import by_rows
from quantization.errors import MeasurementError
from quantization.formats import FORMATS
from quantization.units import KEYS, VALUES, Layout, Slot

CAST = ("fp8-e4m3",)
"""Formats that runtimes cast to: their one scale a tensor is 1 unless a checkpoint says otherwise."""
E4M3_LARGEST = 448.0
ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
"""What attentions call the cache that they are given."""


def quantized(rows: Tensor, format: str) -> Tensor:
    """`rows` (... x width) as a cache of that format gives them back; see `round_online` for errors."""
    if format in CAST:
        return rows.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).to(rows.dtype)
    return round_online(rows, FORMATS[format], "keys or values")


def keeps(format: str) -> bool:
    """Whether a cache can be kept in it: row by row, or cast."""
    return format in CAST or by_rows(FORMATS[format])


class Caches(Watching):
    """The caches of a replica's attentions, each slot in a format or exact.

    Args:
        module: the model, whose attentions are hooked for good.

    Attributes:
        formats: by slot; a slot that isn't there is exact.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.formats: dict[Slot, str] = {}
        self._stand_in = _StandIn(self)
        self.layers = frozenset(self._hook(module))

    def check(self, layout: Layout) -> None:
        """Refuse models some of whose caches can't be reached.

        Raises:
            MeasurementError: with the first layer that has no attention of the usual kind.
        """
        blocks = {layer.block for layer in layout.cache if layer.block is not None}
        if missing := sorted(blocks - self.layers):
            raise MeasurementError(
                f"the attention of layer {missing[0]} isn't given its KV cache as transformers' own "
                "are, so it can't be quantized; leave the cache out of the menu"
            )

    def through(self, layer: int, kind: str, states: Tensor) -> Tensor:
        """What attention gets back of what it has written."""
        format = self.formats.get((layer, kind))
        if (layer, kind) in self._watched:
            self._watched[layer, kind].append(Written(states.detach(), states))
        if format is None:
            return states
        return straight_through(states, partial(quantized, format=format))

    def _hook(self, module: nn.Module) -> Iterator[int]:
        for child in module.modules():
            layer = getattr(child, "layer_idx", None)
            given = inspect.signature(child.forward).parameters
            argument = next((name for name in ARGUMENTS if name in given), None)
            if isinstance(layer, int) and argument:
                child.register_forward_pre_hook(self._given(layer, argument), with_kwargs=True)
                yield layer

    def _given(self, layer: int, argument: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            used = {slot[0] for slot in (*self.formats, *self._watched)}
            return (args, {**kwargs, argument: self._stand_in}) if layer in used else None

        return hook


class _StandIn(DynamicCache):
    """Keeps nothing: gives new keys and values back as a cache would have stored them."""

    def __init__(self, caches: Caches) -> None:
        super().__init__()
        self._caches = caches

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Through the formats."""
        through = self._caches.through
        return through(layer_idx, KEYS, key_states), through(layer_idx, VALUES, value_states)
