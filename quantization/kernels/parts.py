"""Mixtures by rows or columns as one product a part, each on its own format's kernel.

    columns   y = sum_i x[:, places_i] W_i^T          rows   y[:, places_i] = x W_i^T

The parts of a mixture are contiguous, so a split costs a gather of activations (or a scatter of
results) and no irregular access to weights (Atom, arXiv 2310.19102, section 4.1).
"""

import torch
from torch import Tensor
from torch.nn import functional

from quantization.formats import FORMATS, Format, Packed
from quantization.formats.mixtures import Mixture
from quantization.kernels.base import Kernel, Product
from quantization.schemes import FULL_PRECISION


class PartByPart(Kernel):
    """Mixtures all of whose parts are computed by the given kernels, or are in full precision."""

    name = "part-by-part"

    def __init__(self, kernels: tuple[Kernel, ...]) -> None:
        self.devices = kernels[0].devices
        self._kernels = kernels

    def supports(self, format: Format) -> bool:
        """See the class."""
        if not isinstance(format, Mixture):
            return False
        formats = [p.format for p in format.parts if p.format.name != FULL_PRECISION]
        return all(any(k.supports(f) for k in self._kernels) for f in formats)

    def refusal(self, product: Product) -> str | None:
        """What the first part is refused for by all kernels."""
        if not isinstance(product.format, Mixture):
            return f"{product.format.name} isn't a mixture by rows or columns"
        for part, shape in product.format.part_shapes(product.shape):
            inside = product._replace(format=part.format, shape=shape)
            reasons = [kernel.refusal(inside) for kernel in self._kernels]
            if part.format.name != FULL_PRECISION and all(reasons):
                return reasons[0]
        return None

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """See `Kernel.run`."""
        format = FORMATS[packed.format]
        assert isinstance(format, Mixture)
        by_rows = format.dim == -2
        y = x.new_zeros(len(x), packed.shape[0])
        for part, places in zip(format.packed_parts(packed), format.places(packed), strict=True):
            inside = torch.arange(format.size, device=x.device)
            places = (places[:, None] * format.size + inside).flatten()
            if by_rows:
                y[:, places] = _product(x, part)
            else:
                y += _product(x[:, places], part)
        return y if bias is None else y + bias


def _product(x: Tensor, part: Packed) -> Tensor:
    from quantization.kernels.operator import packed_linear  # which imports the registry

    if part.format == FULL_PRECISION:
        return functional.linear(x, part.tensors["values"].to(x.dtype))
    return packed_linear(x, part)
