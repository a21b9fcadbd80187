"""CPU kernels: PyTorch's own weight-only products, where a format's layout can be brought to theirs.

Both want codes in an order of their own and in whole tiles, so each weight is repacked once, from
its packed bytes, when it is first used, and kept for as long as its `codes` tensor lives:
`repacked_bytes` says what that costs. Packed weights are never changed in place, so a repacked one
never goes stale. What a tile adds in columns meets zeros in the activations; rows are cut off.
"""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from quantization.formats import FORMATS, Format, Packed
from quantization.formats.elements import SignedInteger
from quantization.formats.scaled import WHOLE, Scaled
from quantization.formats.scales import Rounded
from quantization.kernels.base import Kernel, Product

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE = 16
_repacked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def repacked_bytes(packed: Packed) -> int:
    """Bytes that CPU kernels hold for this weight beside its packed ones; 0 before its first use."""
    kept: dict[torch.dtype, tuple[Tensor, ...]] = _repacked.get(packed.tensors["codes"], {})
    # codes are shared between the activations' dtypes, scales are not
    tensors = {t.data_ptr(): t for group in kept.values() for t in group}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class Int8Channel(Kernel):
    """`_weight_int8pack_mm`: symmetric int8 with one floating-point scale a row.

    Scales are rounded to the activations' dtype; bfloat16 ones aren't rounded to float16, whose
    range is smaller. Codes are repacked to two's complement, a byte a weight, with columns in
    multiples of 16 (others are read past a row's end in PyTorch 2.13).
    """

    name = "torch-int8"
    devices = "cpu"

    def supports(self, format: Format) -> bool:
        """See the class."""
        return _is_integer(format, 8) and format.columns is WHOLE and not format.asymmetric

    def refusal(self, product: Product) -> str | None:
        """See the class."""
        if not self.supports(product.format):
            return f"{product.format.name} isn't symmetric int8 with a scale a row"
        return _dtype_refusal(product)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """See `Kernel.run`."""

        def repack() -> tuple[Tensor, ...]:
            codes, scales = packed.tensors["codes"], packed.tensors["scales"]
            whole = _padded(codes ^ 0x80, columns=TILE)
            return whole.view(torch.int8), scales.flatten().to(x.dtype)

        codes, scales = _kept(packed, x.dtype, repack)
        return _plus(torch._weight_int8pack_mm(_padded(x, columns=TILE), codes, scales), bias)


class Int4Groups(Kernel):
    """`_weight_int4pack_mm_for_cpu`: int4 in groups of 32, 64 or 128, with zero points or without.

    PyTorch reads a code as (code - 8) S + B, so a zero point Z becomes B = (8 - Z) S; S and B are
    rounded to the activations' dtype. Codes are repacked at half a byte a weight, in whole groups
    and multiples of 16 rows.
    """

    name = "torch-int4"
    devices = "cpu"

    def supports(self, format: Format) -> bool:
        """See the class."""
        return _is_integer(format, 4) and format.columns in (32, 64, 128)

    def refusal(self, product: Product) -> str | None:
        """See the class."""
        format = product.format
        if not self.supports(format):
            return f"{format.name} isn't int4 in groups of 32, 64 or 128"
        return _dtype_refusal(product)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """See `Kernel.run`."""
        format = FORMATS[packed.format]
        assert isinstance(format, Scaled)
        assert format.columns
        group = format.columns

        def repack() -> tuple[Tensor, ...]:
            codes, grid = format.unpack(packed)
            scales = format.scale.load(grid)
            offsets = (8 - grid["zeros"].float()) * scales if format.asymmetric else 0 * scales
            both = torch.stack([_padded(t, rows=TILE).mT for t in (scales, offsets)], -1)
            whole = _padded(codes.int(), rows=TILE, columns=group)
            tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
            return tiles, both.to(x.dtype).contiguous()

        tiles, both = _kept(packed, x.dtype, repack)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(
            _padded(x, columns=group), tiles, group, both
        )
        return _plus(product[:, : packed.shape[-2]], bias)


def _is_integer(format: Format, bits: int) -> TypeGuard[Scaled]:
    return (
        isinstance(format, Scaled)
        and format.element == SignedInteger(bits)
        and isinstance(format.scale, Rounded)
        and format.rows == 1
    )


def _dtype_refusal(product: Product) -> str | None:
    assert isinstance(product.format, Scaled)
    assert isinstance(product.format.scale, Rounded)
    if product.dtype not in DTYPES:
        return f"{product.dtype} activations"
    if product.dtype == torch.float16 and product.format.scale.dtype != torch.float16:
        return f"{product.format.name}'s scales may lie outside float16"
    return None


def _kept(
    packed: Packed, dtype: torch.dtype, repack: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """The repacked tensors of a weight for activations of `dtype`, made at the first use."""
    kept: dict[torch.dtype, tuple[Tensor, ...]] = _repacked.setdefault(packed.tensors["codes"], {})
    if dtype not in kept:
        codes, *rest = repack()
        shared = next((tensors[0] for tensors in kept.values()), codes)
        kept[dtype] = (shared, *rest)
    return kept[dtype]


def _padded(matrix: Tensor, rows: int = 1, columns: int = 1) -> Tensor:
    """The matrix with zeros after its end up to multiples of both; contiguous."""
    height, width = matrix.shape
    return functional.pad(matrix, (0, -width % columns, 0, -height % rows)).contiguous()


def _plus(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product.add_(bias.to(product.dtype))
