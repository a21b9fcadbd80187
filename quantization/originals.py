"""A model's own weights where a bank is asked for: what everything else is compared with."""

import torch
from torch import Tensor

from quantization.bank import REST, Bank, Tensors
from quantization.units import Unit


class Originals(Bank):
    """Nothing but a model's own weights in float32, straight from its files: no bank is written."""

    def __init__(self, bank: Bank) -> None:
        super().__init__(bank.checkpoint, bank.layout, bank.quantizer, torch.float32)
        self._held: dict[str, Tensors] = {}

    def reference(self, unit: Unit) -> Tensors:
        """See `Bank.reference`; held until it is forgotten."""
        if unit.name not in self._held:
            self._held[unit.name] = {s.parameter: self._weights[s.parameter] for s in unit.stored}
        return self._held[unit.name]

    def forget(self, unit: Unit) -> list[Tensor]:
        """See `Bank.forget`."""
        return list(self._held.pop(unit.name, {}).values())

    def rest(self) -> Tensors:
        """See `Bank.rest`; held for good, as replicas tell pages apart by where they lie."""
        if REST not in self._held:
            placed = {site.parameter for unit in self.layout.units for site in unit.stored}
            own = (name for name in self._weights if name not in placed)
            self._held[REST] = {name: self._weights[name] for name in own}
        return self._held[REST]
