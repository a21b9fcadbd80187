"""Triton kernels as `Kernel`s: when they apply, without importing Triton before one runs.

A Triton kernel is a module with a function `launch(x, operands, recipe, bias, shape)`.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantization.formats import FORMATS, Format, Packed
from quantization.kernels.base import Kernel, Product
from quantization.kernels.recipe import operands, recipe

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CAPABILITY = (8, 0)


@dataclass(frozen=True)
class TritonKernel(Kernel):
    """A kernel for every format that has a recipe.

    It applies where Triton is installed, on GPUs of compute capability 8.0 and up, to float16,
    bfloat16 and float32 activations of as many rows as `batches` says (both ends included).

    Args:
        module: what to import; its `launch` runs the kernel.
    """

    name: str
    module: str
    batches: tuple[int, int]
    devices: str = "cuda sm80+"

    def supports(self, format: Format) -> bool:
        """Whether the format has a recipe."""
        return recipe(format) is not None

    def refusal(self, product: Product) -> str | None:
        """See the class."""
        if not self.supports(product.format):
            return f"{product.format.name} has no recipe"
        if not self.batches[0] <= product.batch <= self.batches[1]:
            return f"{product.batch} rows of activations are outside {self.batches}"
        if product.dtype not in DTYPES:
            return f"{product.dtype} activations"
        return _missing(product.device)

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """See `Kernel.run`."""
        format = FORMATS[packed.format]
        constants = recipe(format)
        assert constants is not None
        given = operands(format, packed.tensors, packed.shape[-1])
        launch = importlib.import_module(self.module).launch
        with torch.cuda.device_of(x):  # Triton launches on the current device
            result: Tensor = launch(x, given, constants, bias, packed.shape)
        return result


@cache
def _missing(device: torch.device) -> str | None:
    """What the machine lacks."""
    if importlib.util.find_spec("triton") is None:
        return "triton isn't installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None
