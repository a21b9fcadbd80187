"""Folds: channels of a model that can be scaled without changing what it computes.

What produces a channel is divided by s, what reads it is multiplied by s. Between the two lies
nothing but products, sums and copies, so the model stays the same function, while its quantized
weights don't: the scale decides how finely each input channel is resolved.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantization.units import Site

Parameters = Mapping[str, Tensor]
"""Parameters by their name in the state dict."""


@dataclass(frozen=True)
class Operand:
    """The part of a parameter that a fold scales.

    Args:
        parameter: its name in the state dict.
        axis: of the channels, -1 or -2.
        count: how many channels, the last of that axis: an up projection fused behind its gate,
            values fused behind queries and keys.
        offset: what the model adds to the parameter before it multiplies: 1 in Gemma's norms.
    """

    parameter: str
    axis: int
    count: int
    offset: float = 0.0


@dataclass(frozen=True)
class Fold:
    """Sites that read the same channels, and what produces those.

    Args:
        name: what is divided and what is multiplied, for people.
        sites: the readers that are quantized; their inputs tell which channels matter.
        producers: divided by the scale; `count` is the number of channels.
        readers: multiplied by the scale, along their inputs; routers among them.
        head: width of a block of channels that several blocks of inputs repeat, as the heads of
            grouped-query attention repeat a value head; all channels where nothing is repeated.
        experts: whether each expert has channels, and so scales, of its own.
    """

    name: str
    sites: tuple[Site, ...]
    producers: tuple[Operand, ...]
    readers: tuple[Operand, ...]
    head: int
    experts: bool = False

    @property
    def channels(self) -> int:
        """Channels that are scaled."""
        return self.producers[0].count

    @property
    def repeats(self) -> int:
        """Inputs of a reader for each channel."""
        return self.readers[0].count // self.channels

    def columns(self, scale: Tensor) -> Tensor:
        """The scale of each input of a reader: ... x channels to ... x columns."""
        heads = scale.unflatten(-1, (-1, self.head))
        return heads.repeat_interleave(self.repeats, dim=-2).flatten(-2)

    def pooled(self, by_column: Tensor) -> Tensor:
        """What is known by input, put beside each other for each channel.

        Args:
            by_column: columns, or experts x columns.

        Returns:
            n x channels, or n x experts x channels where experts have scales of their own.
        """
        heads = by_column.unflatten(-1, (self.channels // self.head, self.repeats, self.head))
        values = heads.movedim(-2, 0).flatten(-2)
        return values if self.experts else values.flatten(0, -2)

    def apply(self, parameters: Parameters, scale: Tensor) -> None:
        """Fold a scale (channels, or experts x channels; all above zero) into the parameters."""
        for operand in self.producers:
            _multiply(parameters[operand.parameter], operand, scale.reciprocal())
        for operand in self.readers:
            _multiply(parameters[operand.parameter], operand, self.columns(scale))


@torch.no_grad()
def _multiply(parameter: Tensor, operand: Operand, factor: Tensor) -> None:
    length = parameter.shape[operand.axis]
    part = parameter.narrow(operand.axis, length - operand.count, operand.count)
    factor = factor.to(part)
    if part.dim() > factor.dim():  # a matrix, or a stack of them; else a norm's weight or a bias
        factor = factor.unsqueeze(-2 if operand.axis == -1 else -1)
    part.copy_((part + operand.offset) * factor - operand.offset)
