"""Packed weights as parameters of a model: `F.linear` multiplies by the packed bytes.

    module._parameters["weight"] = nn.Parameter(PackedWeight(packed, dtype), requires_grad=False)

A `PackedWeight` is a tensor without memory of its own but the packed tensors. `F.linear` with it
goes to the operator (`operator.py`); one matrix of a stack, as experts take theirs, is a
`PackedWeight` again; anything else (an embedding, a product of the whole stack) sees a dequantized
copy that lives as long as the call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from quantization.formats import Packed
from quantization.kernels.operator import dequantized, packed_linear

aten = torch.ops.aten


class PackedWeight(Tensor):
    """A `Packed` that models take for a weight of its shape.

    It can't be trained or changed in place, and its packed tensors never change.

    Args:
        packed: the bytes; they decide the device.
        dtype: of the values that others than `F.linear` see; there it is the activations'.
        transposed: whether the model's parameter is the packed matrix transposed.
    """

    packed: Packed
    transposed: bool
    _slices: dict[int, Packed]

    @staticmethod
    def __new__(  # noqa: PYI034 -- the one of Tensor that this overrides is static
        cls: type["PackedWeight"], packed: Packed, dtype: torch.dtype, transposed: bool = False
    ) -> "PackedWeight":
        """A tensor without storage."""
        *leading, rows, columns = packed.shape
        shape = (*leading, columns, rows) if transposed else packed.shape
        device = next(iter(packed.tensors.values())).device
        with torch.inference_mode(False):  # a slice has to be what its stack is
            self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        assert isinstance(self, PackedWeight)
        self.packed, self.transposed = packed, transposed
        self._slices = {}
        return self

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed tensors, which are all that this one holds."""
        return self.packed.nbytes

    def dequantize(self) -> Tensor:
        """A plain tensor of the values."""
        values = dequantized(self.packed).to(self.dtype)
        return values.mT if self.transposed else values

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight({self.packed.format}, {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Catch `F.linear` before it becomes a product of plain matrices."""
        kwargs = kwargs or {}
        if func is functional.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, cls) and weight.dim() == 2 and not weight.transposed:
                return packed_linear(x, weight.packed, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Keep what only renames, moves or takes one matrix packed; dequantize for the rest."""
        kwargs = kwargs or {}
        if func.overloadpacket is aten.to:  # inference mode leaves it whole
            return func.decompose(*args, **kwargs)
        handler = _KEPT_PACKED.get(func)
        if handler is not None and isinstance(args[0], cls):
            kept = handler(*args, **kwargs)
            if kept is not None:
                return kept
        # a view of a tensor made outside inference mode has to be made outside it too
        mode = torch.is_inference_mode_enabled() and not func.is_view
        with torch.inference_mode(mode), torch.no_grad():
            args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs))
            return func(*args, **kwargs)


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _alias(weight: PackedWeight, **_: Any) -> PackedWeight:
    """Another tensor on the same bytes, which never change."""
    alias = PackedWeight(weight.packed, weight.dtype, weight.transposed)
    alias._slices = weight._slices
    return alias


def _moved(
    weight: PackedWeight,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **_: Any,
) -> PackedWeight:
    """On another device, or seen with another dtype."""
    packed = weight.packed
    tensors = {
        name: tensor.to(device, non_blocking=non_blocking)
        for name, tensor in packed.tensors.items()
    }
    moved = Packed(packed.format, packed.shape, tensors)
    return PackedWeight(moved, dtype or weight.dtype, weight.transposed)


def _select(weight: PackedWeight, dim: int, index: int) -> PackedWeight | None:
    """One entry of the leading dimension, whose bytes are its own; the same ones every time."""
    shape = weight.packed.shape
    leading = all(t.shape[:1] == shape[:1] for t in weight.packed.tensors.values())
    if dim not in (0, -weight.dim()) or weight.dim() < 3 or not leading:
        return None
    place = index % shape[0]
    if place not in weight._slices:
        tensors = {name: tensor[place] for name, tensor in weight.packed.tensors.items()}
        weight._slices[place] = Packed(weight.packed.format, shape[1:], tensors)
    return PackedWeight(weight._slices[place], weight.dtype, weight.transposed)


_KEPT_PACKED: dict[Any, Callable[..., PackedWeight | None]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _alias,
    aten._to_copy.default: _moved,
    aten.select.int: _select,
}
