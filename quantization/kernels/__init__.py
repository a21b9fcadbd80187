"""Kernels that multiply by packed weights. A new one is a file and a line below.

The operator `bitfront::packed_linear` (`operator.py`) computes everything everywhere by
dequantizing first: that is its specification. The kernels here compute some of it from the packed
bytes, and each says when.
"""

import torch

from quantization.formats import Format
from quantization.kernels.base import Kernel, Product
from quantization.kernels.parts import PartByPart
from quantization.kernels.torch_cpu import Int4Groups, Int8Channel
from quantization.kernels.triton_kernel import TritonKernel

_TRITON = (
    TritonKernel("triton-decode", "quantization.kernels.triton_decode", batches=(1, 4)),
    TritonKernel("triton-prefill", "quantization.kernels.triton_prefill", batches=(1, 2**20)),
)
_CPU = (Int8Channel(), Int4Groups())

KERNELS: dict[str, tuple[Kernel, ...]] = {
    "cuda": (*_TRITON, PartByPart(_TRITON)),
    "cpu": (*_CPU, PartByPart(_CPU)),
}
"""Kernels of each kind of device, the first that doesn't refuse a product computes it."""


def kernel_devices(format: Format, shape: tuple[int, int]) -> list[str]:
    """Devices that multiply by such a weight from its packed bytes; the others only simulate it.

    Needs neither a GPU nor Triton: `['cuda sm80+', 'cpu']`.
    """
    product = Product(format, shape, 1, torch.bfloat16, torch.device("cpu"))
    gpu = [k.devices for k in KERNELS["cuda"] if k.supports(format)]  # in any shape
    cpu = [k.devices for k in KERNELS["cpu"] if k.supports(format) and not k.refusal(product)]
    return list(dict.fromkeys(gpu + cpu))


__all__ = ["KERNELS", "Kernel", "Product", "kernel_devices"]
