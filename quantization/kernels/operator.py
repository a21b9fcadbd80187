"""The operator `bitfront::packed_linear`: activations times a packed weight.

    packed_linear(Tensor x, Tensor[] parts, str[] names, str format, int[] shape, Tensor? bias)

    x       ... x columns, any floating dtype, which is also the result's
    parts   the tensors of a `Packed`; `names` says which, both in sorted order of the names
    format  a name in `FORMATS`; `shape` is rows x columns of the weight
    result  ... x rows

Its specification is the default implementation: unpack, decode to float32, cast to x's dtype,
`F.linear`. That is bit for bit what a model with the dequantized weight computes. On the CPU and on
CUDA the first kernel of `KERNELS` that doesn't refuse the product takes its place; kernels agree
with the reference up to the arithmetic of x's dtype.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from quantization.formats import FORMATS, Packed
from quantization.kernels import KERNELS
from quantization.kernels.base import Kernel, Product

LIBRARY = torch.library.Library("bitfront", "DEF")
LIBRARY.define(
    "packed_linear(Tensor x, Tensor[] parts, str[] names, str format, int[] shape, Tensor? bias)"
    " -> Tensor"
)
_simulating: ContextVar[bool] = ContextVar("simulating", default=False)


def packed_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """`x` (... x columns) times the transposed packed weight, plus `bias` (rows): ... x rows."""
    names = sorted(packed.tensors)
    parts = [packed.tensors[name] for name in names]
    return torch.ops.bitfront.packed_linear(x, parts, names, packed.format, packed.shape, bias)


def dequantized(packed: Packed) -> Tensor:
    """The float32 values of a packed tensor."""
    format = FORMATS[packed.format]
    return format.decode(*format.unpack(packed))


def reference(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """The specification of `packed_linear`."""
    return functional.linear(x, dequantized(packed).to(x.dtype), bias)


@contextmanager
def simulation() -> Iterator[None]:
    """Let the reference compute every product of this thread, whatever kernels there are."""
    token = _simulating.set(True)
    try:
        yield
    finally:
        _simulating.reset(token)


@lru_cache(maxsize=2**16)
def kernel_for(
    format: str, shape: tuple[int, ...], batch: int, dtype: torch.dtype, device: torch.device
) -> Kernel | None:
    """The kernel that computes a product; None when that is left to the reference."""
    product = Product(FORMATS[format], shape, batch, dtype, device)
    kernels = KERNELS.get(device.type, ())
    return next((kernel for kernel in kernels if kernel.refusal(product) is None), None)


def _reference(
    x: Tensor,
    parts: list[Tensor],
    names: list[str],
    format: str,
    shape: list[int],
    bias: Tensor | None,
) -> Tensor:
    return reference(x, Packed(format, tuple(shape), dict(zip(names, parts, strict=True))), bias)


def _specialised(
    x: Tensor,
    parts: list[Tensor],
    names: list[str],
    format: str,
    shape: list[int],
    bias: Tensor | None,
) -> Tensor:
    packed = Packed(format, tuple(shape), dict(zip(names, parts, strict=True)))
    batch = prod(x.shape[:-1])
    kernel = None
    if batch and not _simulating.get():
        kernel = kernel_for(format, packed.shape, batch, x.dtype, x.device)
    if kernel is None:
        return reference(x, packed, bias)
    result = kernel.run(x.reshape(batch, x.shape[-1]), packed, bias)
    return result.view(*x.shape[:-1], shape[0])


def _shape_only(x: Tensor, *others: object) -> Tensor:
    _, _, _, shape, _ = others
    assert isinstance(shape, list | tuple)
    return x.new_empty(*x.shape[:-1], shape[0])


LIBRARY.impl("packed_linear", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("packed_linear", _specialised, "CPU")
LIBRARY.impl("packed_linear", _specialised, "CUDA")
torch.library.register_fake("bitfront::packed_linear", _shape_only, lib=LIBRARY)
