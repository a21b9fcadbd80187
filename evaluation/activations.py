"""Activations in a format: what each linear layer reads is quantized token by token, before it."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from evaluation.online import Watching, Written, round_online, straight_through
from quantization.activations import ACTIVATIONS
from quantization.units import Layout


def quantized(states: Tensor, format: str) -> Tensor:
    """Inputs of a layer (... x width) as its kernel reads them; see `round_online` for errors."""
    return round_online(states, ACTIVATIONS[format], "activations")


class Activations(Watching):
    """The inputs of a replica's linear layers, each in a format or exact.

    Args:
        module: the model, whose layers are hooked for good.
        layout: its units.

    Attributes:
        formats: by the layer's path; a layer that isn't there reads exact inputs.
    """

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.formats: dict[str, str] = {}
        for unit in layout.units:
            for site in unit.sites if unit.kind == "linear" else ():
                layer = module.get_submodule(site.name)
                layer.register_forward_pre_hook(partial(self._before, site.name))

    def _before(self, path: str, _: nn.Module, args: tuple[Any, ...]) -> Any:
        format = self.formats.get(path)
        if format is None and path not in self._watched:
            return None
        states, *rest = args
        if path in self._watched:
            states = states.view_as(states)  # others may read the same tensor
            self._watched[path].append(Written(states.detach(), states))
        if format is not None:
            states = straight_through(states, partial(quantized, format=format))
        return (states, *rest)
