"""A model whose weights are the bank's pages: built without loading, switched without copying."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.activations import Activations
from evaluation.caches import Caches
from quantization.bank import Bank, Tensors
from quantization.kernels.packed_weight import PackedWeight
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Unit, cache_slot
from quantization.weights import skeleton

UNLOADED = "unloaded"


class AssembledModel:
    """One replica of a model, holding whichever candidate was assigned last; at first nothing.

    Not thread-safe: a worker owns its replica. On the CPU the parameters are views of the bank's
    mapped files; on an accelerator each scheme of a unit is moved there once and kept until the
    unit is unloaded. Packed weights take a parameter's place until plain ones return.

    Attributes:
        caches: the KV caches' formats; None where they aren't units.
        activations: the formats of what linear layers read; None until a scheme names one.
        block_outputs: what turns hidden states into what each block returns, once it has been tried
            (`evaluation.blocks`).
    """

    def __init__(self, bank: Bank, device: torch.device) -> None:
        self.bank, self.device = bank, device
        self.caches: Caches | None = None
        self.activations: Activations | None = None
        self.block_outputs: list[Callable[[Tensor], Any]] | None = None
        self.module = skeleton(bank.checkpoint, bank.dtype)
        self._aliases = _aliases(self.module)
        self._on_device: dict[int, Tensor] = {}
        self._packed: set[str] = set()
        shapes = {name: p.shape for name, p in self.module.named_parameters()}
        for site in (site for unit in bank.layout.units for site in unit.stored):
            self._adopt({site.parameter: self._nothing(shapes[site.parameter])})
        self._adopt(bank.rest())
        self.module.to(device)
        self.module.eval()
        if len(bank.layout.weights) < len(bank.layout.units):
            self.caches = Caches(self.module)
            self.caches.check(bank.layout)
        self._parameters = dict(self.module.named_parameters())
        self._current: list[Scheme | str | None] = [UNLOADED] * len(bank.layout.units)

    def assign(self, schemes: Sequence[Scheme | None] | None) -> None:
        """Point every unit at its scheme's tensors; None is the reference, of a unit or of all."""
        self.load(range(len(self._current)), schemes)

    def load(
        self,
        units: Iterable[int],
        schemes: Sequence[Scheme | None] | None = None,
        *,
        dense: bool = False,
    ) -> None:
        """The same for some units.

        Args:
            units: their numbers in the layout.
            schemes: one for each unit of the layout; None is the reference.
            dense: dequantize what the bank has packed, for passes that differentiate or that use a
                weight many times before they let go of it.
        """
        for i in units:
            scheme = None if schemes is None else schemes[i]
            if scheme == self._current[i]:
                continue
            unit = self.bank.layout.units[i]
            self._keep_past(unit, scheme)
            self._read_in(unit, scheme)
            tensors = (
                self.bank.reference(unit) if scheme is None else self.bank.tensors(unit, scheme)
            )
            for name, tensor in tensors.items():
                packed = dense and isinstance(tensor, PackedWeight)
                self._point(name, tensor.dequantize() if packed else tensor)
            self._current[i] = scheme

    def reload(self, units: Iterable[int], schemes: Sequence[Scheme | None] | None = None) -> None:
        """Load again what somebody has changed in place of the bank's tensors."""
        for i in units:
            self._current[i] = UNLOADED
            self.load([i], schemes, dense=True)

    def unload(self, units: Iterable[int]) -> None:
        """Let go of the weights of some units, and of their pages; `load` brings them back."""
        for i in units:
            if self._current[i] == UNLOADED:
                continue
            unit = self.bank.layout.units[i]
            self._keep_past(unit, None)
            self._read_in(unit, None)
            for tensor in self.bank.forget(unit):
                self._on_device.pop(_page(tensor), None)
            for site in unit.stored:
                shape = self._parameters[site.parameter].shape
                self._point(site.parameter, self._nothing(shape))
            self._current[i] = UNLOADED

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of that name in the state dict."""
        return self._parameters[name]

    def _keep_past(self, unit: Unit, scheme: Scheme | None) -> None:
        """Put the caches of a unit, where it is one, into a scheme's format."""
        if unit.kind != "cache":
            return
        assert self.caches
        for slot in map(cache_slot, unit.sites):
            self.caches.formats.pop(slot, None)
            if scheme is not None:
                self.caches.formats[slot] = scheme.weight

    def read_inputs(self) -> Activations:
        """The hooks before linear layers, which are there from now on."""
        self.activations = self.activations or Activations(self.module, self.bank.layout)
        return self.activations

    def _read_in(self, unit: Unit, scheme: Scheme | None) -> None:
        """Let the linear layers of a unit read their inputs in a scheme's format."""
        if unit.kind != "linear":
            return
        format = None if scheme is None else scheme.activation
        if format not in (None, FULL_PRECISION):
            self.read_inputs()
        if self.activations:
            for site in unit.sites:
                self.activations.formats.pop(site.name, None)
                if format not in (None, FULL_PRECISION):
                    self.activations.formats[site.name] = str(format)

    def _point(self, name: str, tensor: Tensor) -> None:
        """Make the bank's tensor the model's parameter of that name."""
        if isinstance(tensor, PackedWeight):
            self._own(name, nn.Parameter(self._placed(tensor), requires_grad=False))
            self._packed.add(name)
            return
        self._parameters[name].data = self._placed(tensor)
        if name in self._packed:
            self._own(name, self._parameters[name])
            self._packed.discard(name)

    def _placed(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; the same one for the same page of the bank."""
        if tensor.device.type == self.device.type:
            return tensor
        page = _page(tensor)
        if page not in self._on_device:
            with torch.inference_mode(mode=False):  # kept, also for passes that differentiate
                self._on_device[page] = tensor.to(self.device)
        return self._on_device[page]

    def _nothing(self, shape: Sequence[int]) -> Tensor:
        """Stands for a tensor of this shape, with the memory of one number."""
        return torch.zeros((), dtype=self.bank.dtype, device=self.device).expand(shape)

    def _own(self, name: str, parameter: nn.Parameter) -> None:
        """Give the parameter to every module that holds it."""
        for path, leaf in self._aliases[name]:
            self.module.get_submodule(path)._parameters[leaf] = parameter

    def _adopt(self, tensors: Tensors) -> None:
        """Replace meta parameters (and persistent buffers) by real ones."""
        for name, tensor in tensors.items():
            if name not in self._aliases:
                path, _, leaf = name.rpartition(".")
                self.module.get_submodule(path)._buffers[leaf] = tensor
                continue
            self._own(name, nn.Parameter(self._placed(tensor), requires_grad=False))


def _page(tensor: Tensor) -> int:
    """What tells a tensor of the bank from others as long as its pages are mapped."""
    # a packed weight has no storage of its own; the bank keeps it as long as its pages
    return id(tensor) if isinstance(tensor, PackedWeight) else tensor.data_ptr()


def _aliases(module: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """First name of each parameter, and every (module, attribute) that holds it."""
    first = {id(p): name for name, p in module.named_parameters()}
    owners: dict[str, list[tuple[str, str]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        owners.setdefault(first[id(parameter)], []).append((path, leaf))
    return owners
