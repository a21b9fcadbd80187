"""Compile the Triton kernels for compute capabilities, without a GPU: `compile_kernels.py 80 90`."""

import itertools
import sys

import torch
from triton import compiler
from triton.backends.compiler import GPUTarget

from quantization.formats import FORMATS
from quantization.kernels import triton_decode, triton_prefill
from quantization.kernels.recipe import operands, recipe

NAMES = ("int4-g64", "int3-g32-asym", "squeezellm4", "dialectfp4-b32")
TYPES = {
    torch.uint8: "*u8", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
}  # fmt: skip


def compiled(kernel, name, capability, **constants):
    """Assembly of one format's kernel for bfloat16 activations."""
    format, function = FORMATS[name], kernel.fn
    packed = format.pack(*format.nearest(torch.ones(1, 64)))
    given = operands(format, packed.tensors, 64)
    constants |= recipe(format).constants() | {"ALIGNED": True, "BIASED": True}
    pointers = {n: TYPES[t.dtype] for n, t in given._asdict().items() if n != "groups"}
    pointers |= dict.fromkeys(("x", "bias", "out"), "*bf16")
    signature = {
        n: "constexpr" if n in constants else pointers.get(n, "i32") for n in function.arg_names
    }
    places = {(function.arg_names.index(n),): value for n, value in constants.items()}
    source = compiler.ASTSource(function, signature, places)
    return compiler.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4}).asm["ptx"]


def main() -> None:
    for capability, name in itertools.product(map(int, sys.argv[1:]), NAMES):
        words, codes = triton_decode.chunk(recipe(FORMATS[name]).bits)
        assembly = compiled(
            triton_decode.decode, name, capability,
            WORDS=words, CODES=codes, TILE_BATCH=1, TILE_ROWS=16, TILE_CHUNKS=128,
        )  # fmt: skip
        if name == "int4-g64":
            assert assembly.count("ld.global.b32") == 16, "one word a row and thread"
        compiled(
            triton_prefill.prefill, name, capability,
            WIDE=False, TILE_BATCH=16, TILE_ROWS=32, TILE_COLUMNS=128,
        )  # fmt: skip


if __name__ == "__main__":
    main()
