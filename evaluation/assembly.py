"""A model whose weights are the bank's pages: built without loading, switched without copying."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from quantization.bank import Bank, Tensors
from quantization.checkpoints import load_config
from quantization.kernels.packed_weight import PackedWeight
from quantization.schemes import Scheme


class AssembledModel:
    """One replica of a model, holding whichever candidate was assigned last.

    Not thread-safe: a worker owns its replica. On the CPU the parameters are views of the bank's
    mapped files; on an accelerator each scheme of a unit is moved there once and kept. Packed
    weights take a parameter's place until plain ones return.
    """

    def __init__(self, bank: Bank, device: torch.device) -> None:
        self.bank, self.device = bank, device
        self.module = _skeleton(bank)
        self._aliases = _aliases(self.module)
        self._on_device: dict[int, Tensor] = {}
        self._packed: set[str] = set()
        for unit in bank.layout.units:
            self._adopt(bank.reference(unit))
        self._adopt(bank.rest())
        self.module.to(device)
        self.module.eval()
        self._parameters = dict(self.module.named_parameters())
        self._current: list[Scheme | None] = [None] * len(bank.layout.units)

    def assign(self, schemes: Sequence[Scheme] | None) -> None:
        """Point every unit at its scheme's tensors; None restores the reference."""
        wanted = [None] * len(self._current) if schemes is None else list(schemes)
        for i, (unit, scheme) in enumerate(zip(self.bank.layout.units, wanted, strict=True)):
            if scheme == self._current[i]:
                continue
            tensors = (
                self.bank.reference(unit) if scheme is None else self.bank.tensors(unit, scheme)
            )
            for name, tensor in tensors.items():
                self._point(name, tensor)
            self._current[i] = scheme

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of that name in the state dict."""
        return self._parameters[name]

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
        if self.device.type == "cpu":
            return tensor
        # a packed weight has no storage of its own; the bank keeps it as long as its pages
        page = id(tensor) if isinstance(tensor, PackedWeight) else tensor.data_ptr()
        if page not in self._on_device:
            self._on_device[page] = tensor.to(self.device)
        return self._on_device[page]

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


def _skeleton(bank: Bank) -> Any:
    """The model with its parameters on the meta device and its computed buffers real."""
    from transformers import AutoModelForCausalLM

    config = load_config(bank.checkpoint)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=bank.dtype,
            trust_remote_code=bank.checkpoint.trust_remote_code,
        )
    model.tie_weights()  # moving to the meta device parted what was tied
    return model


def _aliases(module: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """First name of each parameter, and every (module, attribute) that holds it."""
    first = {id(p): name for name, p in module.named_parameters()}
    owners: dict[str, list[tuple[str, str]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        owners.setdefault(first[id(parameter)], []).append((path, leaf))
    return owners
