"""Integers of our own as ggml's blocks: the same numbers, in another order.

`int4-g32` is Q4_0 and `int8-g32` is Q8_0 (a float16 scale, codes about zero), so that what any of
our quantizers made, GPTQ for one, is served by llama.cpp as it was measured.
"""

from math import prod

import torch
from torch import Tensor

from engines.llama_cpp import LOSSLESS
from quantization.formats import Packed
from quantization.packing import unpack_bits

BLOCK = 32


def blocks(packed: Packed) -> Tensor:
    """A matrix's blocks: uint8, rows x row bytes; of packed experts those of all, one after another.

    Args:
        packed: in one of `llama_cpp.LOSSLESS`, whole groups.
    """
    rows, columns = prod(packed.shape[:-1]), packed.shape[-1]
    bits = 4 if LOSSLESS[packed.format] == "q4_0" else 8
    codes = unpack_bits(packed.tensors["codes"], bits, columns).view(rows, -1, BLOCK)
    if bits == 4:  # the first half of a block in the low nibbles, the second in the high ones
        low, high = codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :]
        values = (low | high << 4).to(torch.uint8)
    else:
        values = (codes - 128).to(torch.int8).view(torch.uint8)
    scales = packed.tensors["scales"].contiguous().view(torch.uint8).view(rows, -1, 2)
    return torch.cat([scales, values], -1).flatten(1)
