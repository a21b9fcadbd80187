"""What Triton kernels share: packed bytes to numbers, in registers.

Capitals are compile-time constants: those of a `Recipe`, under their names there. Everything works
on tiles of any shape; `valid` masks what lies outside the matrix, which reads as zero. Only
arithmetic of compute capability 8.0 is used: 8-bit floats and powers of two are put together from
their bits.
"""

import triton
import triton.language as tl


@triton.jit
def load_words(row, row_bytes, index, valid, ALIGNED: tl.constexpr):
    """32-bit words of byte streams that begin at the pointers `row`; zero past a stream's end.

    ALIGNED: streams begin at multiples of four bytes and have whole words. Otherwise bytes are
    loaded one by one.
    """
    if ALIGNED:
        words = tl.cast(row, tl.pointer_type(tl.uint32), bitcast=True)
        return tl.load(words + index, mask=valid & (index * 4 < row_bytes), other=0)
    word = tl.load(row + index * 4, mask=valid & (index * 4 < row_bytes), other=0).to(tl.uint32)
    for k in tl.static_range(1, 4):
        place = index * 4 + k
        byte = tl.load(row + place, mask=valid & (place < row_bytes), other=0)
        word = word | (byte.to(tl.uint32) << (8 * k))
    return word


@triton.jit
def load_codes(row, row_bytes, index, valid, BITS: tl.constexpr):
    """Codes number `index` of streams that begin at the pointers `row`, from one or two bytes."""
    bit = index * BITS
    place = bit // 8
    low = tl.load(row + place, mask=valid & (place < row_bytes), other=0).to(tl.uint32)
    if 8 % BITS != 0:
        high = tl.load(row + place + 1, mask=valid & (place + 1 < row_bytes), other=0)
        low = low | (high.to(tl.uint32) << 8)
    return (low >> (bit % 8).to(tl.uint32)) & ((1 << BITS) - 1)


@triton.jit
def minifloat(code, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """The float32 that a small float's bits stand for, subnormals included.

    Its exponent and mantissa bits are also those of a float32, 2^(127 - bias) too small.
    """
    BIAS: tl.constexpr = (1 << (EXPONENT - 1)) - 1
    magnitude = code & ((1 << (EXPONENT + MANTISSA)) - 1)
    sign = code >> (EXPONENT + MANTISSA)
    bits = (magnitude << (23 - MANTISSA)) | (sign << 31)
    return bits.to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))


@triton.jit
def power_of_two(exponent):
    """2^(exponent - 127) of E8M0 bytes; 2^-127 is subnormal."""
    bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def integer(code):
    """A small unsigned integer as float32, by the mantissa bits of 2^23."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def level(
    code, place, table, valid,
    ELEMENT: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr,
    ZEROS: tl.constexpr,
):  # fmt: skip
    """The float32 that a code stands for in units of its scale, before its zero point.

    place: where in `table` the code's levels begin (`row_table`, `dialect`).
    """
    if ELEMENT == "integer":
        value = integer(code)
        if ZEROS == "none":
            value = value - (1 << (BITS - 1))
    elif ELEMENT == "fixed":  # two's complement with the top bit flipped is offset binary
        value = (integer(code ^ 128) - 128.0) * (1.0 / 64)
    elif ELEMENT == "float":
        value = minifloat(code, EXPONENT, MANTISSA)
    elif ELEMENT == "table":
        value = tl.load(table + code)
    elif ELEMENT == "row_table":
        value = tl.load(table + (place + code), mask=valid, other=0.0).to(tl.float32)
    else:
        magnitude = tl.load(table + (place + (code & 7)))
        value = tl.where(code >= 8, -magnitude, magnitude)
    return value


@triton.jit
def load_scales(
    scales, matrix_scale, row, group, groups, valid, SCALE: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Float32 scales of column blocks `group` in the rows `row` (64 bits)."""
    if HEIGHT == 0:
        block = row * 0
    else:
        block = row // HEIGHT
    if SCALE == "dialect":  # float16's exponent of a maximum that lies in [8, 16) half units
        row_bytes = (groups * 5 + 7) // 8
        exponent = load_codes(scales + block * row_bytes, row_bytes, group, valid, 5)
        scale = power_of_two(exponent + (127 - 15 - 3))
    else:
        stored = tl.load(scales + block * groups + group, mask=valid, other=0)
        if SCALE == "plain":
            scale = stored.to(tl.float32)
        elif SCALE == "power":
            scale = power_of_two(stored.to(tl.uint32))
        else:
            scale = minifloat(stored.to(tl.uint32), 4, 3) * tl.load(matrix_scale)
    return scale


@triton.jit
def load_places(indices, row, group, groups, valid, ELEMENT: tl.constexpr, BITS: tl.constexpr):
    """Where in the table the levels of a row or of a group begin, for `level`."""
    if ELEMENT == "dialect":
        row_bytes = (groups + 1) // 2
        place = load_codes(indices + row * row_bytes, row_bytes, group, valid, 4).to(tl.int64) * 8
    elif ELEMENT == "row_table":
        place = row << BITS
    else:
        place = row * 0
    return place


@triton.jit
def load_zeros(indices, row, group, groups, valid, BITS: tl.constexpr, ZEROS: tl.constexpr):
    """Zero points as float32."""
    if ZEROS == "real":
        zero = tl.load(indices + row * groups + group, mask=valid, other=0.0).to(tl.float32)
    else:
        row_bytes = (groups * BITS + 7) // 8
        zero = integer(load_codes(indices + row * row_bytes, row_bytes, group, valid, BITS))
    return zero
