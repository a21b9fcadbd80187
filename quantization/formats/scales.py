"""Scales: how a group's scale itself is stored.

A scale type turns ideal scales (float32, `... x row blocks x column blocks`) into grid tensors and
back. What comes back is never zero, so that dividing by it is safe.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil, log2, prod

import torch
from torch import Tensor

from quantization.errors import QuantizationError
from quantization.formats.base import Grid
from quantization.formats.elements import E4M3, Element
from quantization.packing import pack_bits, packed_bytes, unpack_bits

Shape = tuple[int, ...]


class ScaleType(ABC):
    """How scales are stored; `suffix` marks it in format names where it isn't the usual one."""

    suffix: str

    @abstractmethod
    def store(self, reach: Tensor, element: Element) -> Grid:
        """Grid tensors for groups whose `reach` should map to the element's largest magnitude.

        Raises:
            QuantizationError: a scale above what the type can hold.
        """

    @abstractmethod
    def load(self, grid: Grid) -> Tensor:
        """The float32 scales, of the shape of `reach`."""

    @abstractmethod
    def nbytes(self, shape: Shape) -> int:
        """Bytes for scales of `shape`, equal to those of `pack`."""

    def pack(self, grid: Grid) -> Grid:
        """The tensors that a file holds; by default the grid's own."""
        return {name: grid[name] for name in self.tensors}

    def unpack(self, tensors: Grid, shape: Shape) -> Grid:
        """Undo `pack`."""
        return {name: tensors[name] for name in self.tensors}

    tensors: tuple[str, ...] = ("scales",)


@dataclass(frozen=True)
class Rounded(ScaleType):
    """One floating-point number of a torch dtype a scale."""

    dtype: torch.dtype

    @property
    def suffix(self) -> str:  # type: ignore[override]
        """float16 is the usual one."""
        return {torch.float16: "", torch.bfloat16: "-bf16", torch.float32: ""}[self.dtype]

    def store(self, reach: Tensor, element: Element) -> Grid:
        """Round to nearest, at least the type's smallest number."""
        scales = reach / element.largest
        limits = torch.finfo(self.dtype)
        _check(scales, limits.max, str(self.dtype).removeprefix("torch."))
        smallest = limits.smallest_normal * limits.eps
        return {"scales": scales.clamp(min=smallest).to(self.dtype)}

    def load(self, grid: Grid) -> Tensor:
        """Widen."""
        return grid["scales"].float()

    def nbytes(self, shape: Shape) -> int:
        """An item each."""
        return prod(shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PowerOfTwo(ScaleType):
    """OCP E8M0: a biased exponent byte; 255 would be NaN and isn't written.

    Args:
        microscaling: the specification's rule 2^(floor(log2 reach) - emax), under which the
            largest values may saturate; otherwise the smallest power that lets none do so.
    """

    microscaling: bool = False

    suffix = "-e8m0"

    def store(self, reach: Tensor, element: Element) -> Grid:
        """See the class."""
        if self.microscaling:
            exponent = _floor_log2(reach) - element.emax
        else:
            scales = (reach / element.largest).clamp(min=2.0**-127)
            exponent = _floor_log2(scales)
            exponent += scales > torch.ldexp(torch.ones_like(scales), exponent)
            # the extreme codes times the scale are float32 numbers, too
            _check(scales, 2.0 ** (127 - ceil(log2(element.largest + 1))), "E8M0")
        return {"scales": (exponent.clamp(-127, 127) + 127).to(torch.uint8)}

    def load(self, grid: Grid) -> Tensor:
        """2^(byte - 127); the lowest ones are float32 subnormals."""
        scales = grid["scales"]
        one = torch.ones(scales.shape, device=scales.device)
        return torch.ldexp(one, scales.to(torch.int32) - 127)

    def nbytes(self, shape: Shape) -> int:
        """A byte each."""
        return prod(shape)


@dataclass(frozen=True)
class TensorScaled(ScaleType):
    """E4M3 scales under one float32 scale a matrix that makes the largest of them 448 (NVFP4)."""

    suffix = "-fp8"
    tensors = ("scales", "tensor_scale")

    def store(self, reach: Tensor, element: Element) -> Grid:
        """Tensor scale = max reach / (largest x 448), then the rest as E4M3."""
        scales = reach / element.largest
        _check(scales, 2.0**120, "a float32 tensor scale")  # sums of products stay finite
        whole = scales.amax((-1, -2), keepdim=True) / E4M3.largest
        whole = whole.clamp(min=2.0**-120)
        inner = (scales / whole).clamp(2.0**-9, E4M3.largest).to(torch.float8_e4m3fn)
        return {"scales": inner, "tensor_scale": whole}

    def load(self, grid: Grid) -> Tensor:
        """Their products."""
        return grid["scales"].float() * grid["tensor_scale"]

    def nbytes(self, shape: Shape) -> int:
        """A byte each, four a matrix."""
        return prod(shape) + 4 * prod(shape[:-2])


@dataclass(frozen=True)
class SecondLevel(ScaleType):
    """Scales that are themselves integers of `bits` bits (SpQR, arXiv 2306.03078, section 4.2).

    Each `group` neighbours of a row share a float16 step and a float16 minimum. (SpQR's code groups
    over rows; along a row the bytes are the same, and rows stay independent of each other.)
    """

    bits: int = 3
    group: int = 16

    suffix = "-spqr"
    tensors = ("scale_codes", "scale_steps", "scale_minima")

    def store(self, reach: Tensor, element: Element) -> Grid:
        """Round each scale to its nearest level."""
        return self.encode(reach / element.largest)

    def encode(self, values: Tensor) -> Grid:
        """Any non-negative `... x n` values."""
        padded = torch.cat(
            [values, values[..., -1:].expand(*values.shape[:-1], self._pad(values))], -1
        )
        grouped = padded.unflatten(-1, (-1, self.group))
        low, high = grouped.amin(-1), grouped.amax(-1)
        _check(high, torch.finfo(torch.float16).max, "float16")
        minima = low.clamp(min=2.0**-24).half()
        steps = ((high - minima.float()) / (2**self.bits - 1)).clamp(min=2.0**-24).half()
        codes = (grouped - minima.float()[..., None]) / steps.float()[..., None]
        codes = codes.round_().clamp_(0, 2**self.bits - 1).flatten(-2)[..., : values.shape[-1]]
        return {
            "scale_codes": codes.to(torch.int16),
            "scale_steps": steps,
            "scale_minima": minima,
        }

    def load(self, grid: Grid) -> Tensor:
        """Minimum + step x code."""
        codes = grid["scale_codes"]
        columns = codes.shape[-1]

        def wide(name: str) -> Tensor:
            return grid[name].float().repeat_interleave(self.group, -1)[..., :columns]

        return wide("scale_minima") + wide("scale_steps") * codes.float()

    def nbytes(self, shape: Shape) -> int:
        """A bit stream a row, four bytes a group of scales."""
        *leading, groups = shape
        return prod(leading) * (packed_bytes(groups, self.bits) + 4 * -(-groups // self.group))

    def pack(self, grid: Grid) -> Grid:
        """Codes as a bit stream."""
        return {**super().pack(grid), "scale_codes": pack_bits(grid["scale_codes"], self.bits)}

    def unpack(self, tensors: Grid, shape: Shape) -> Grid:
        """Undo `pack`."""
        codes = unpack_bits(tensors["scale_codes"], self.bits, shape[-1])
        return {**super().unpack(tensors, shape), "scale_codes": codes}

    def _pad(self, values: Tensor) -> int:
        return -values.shape[-1] % self.group


FP16 = Rounded(torch.float16)
BF16 = Rounded(torch.bfloat16)
FP32 = Rounded(torch.float32)


def _floor_log2(x: Tensor) -> Tensor:
    """Exactly, as int32; -127 for zero and float32's subnormals."""
    return ((x.contiguous().view(torch.int32) >> 23) & 0xFF) - 127


def _check(scales: Tensor, largest: float, holder: str) -> None:
    highest = scales.max().item() if scales.numel() else 0.0
    if not highest <= largest:
        raise QuantizationError(
            f"a group needs the scale {highest:.3g}, above the {largest:g} that {holder} holds; "
            "keep this layer in bf16"
        )
