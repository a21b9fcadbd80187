"""Codes into bytes: rows of small integers as little-endian bit streams (or trits), and back.

Value `i` of a row occupies bits `i * bits … (i + 1) * bits - 1` of the row's stream, lowest bit
first, so 8 values take exactly `bits` bytes and a row is padded to a whole byte only at its end.
"""

import torch
from torch import Tensor


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row of `columns` values."""
    return (columns * bits + 7) // 8


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack `values` (... x columns, integers in [0, 2**bits)) into uint8 (... x row bytes)."""
    if bits == 8:
        return values.to(torch.uint8)
    columns = values.shape[-1]
    padded = torch.nn.functional.pad(values.to(torch.int64), (0, -columns % 8))
    eights = padded.unflatten(-1, (-1, 8))
    word = torch.zeros_like(eights[..., 0])
    for i in range(8):
        word |= eights[..., i] << (i * bits)
    stream = torch.stack([(word >> (8 * k)) & 0xFF for k in range(bits)], dim=-1)
    return stream.flatten(-2)[..., : packed_bytes(columns, bits)].to(torch.uint8).contiguous()


def unpack_bits(stream: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_bits`: uint8 (... x row bytes) to int16 (... x columns)."""
    if bits == 8:
        return stream.to(torch.int16)
    padded = torch.nn.functional.pad(stream.to(torch.int64), (0, -stream.shape[-1] % bits))
    chunks = padded.unflatten(-1, (-1, bits))
    word = torch.zeros_like(chunks[..., 0])
    for k in range(bits):
        word |= chunks[..., k] << (8 * k)
    values = torch.stack([(word >> (i * bits)) & (2**bits - 1) for i in range(8)], dim=-1)
    return values.flatten(-2)[..., :columns].to(torch.int16)


def pack_trits(values: Tensor) -> Tensor:
    """Pack `values` (... x columns, integers in [0, 3)) five to a byte, the first one lowest."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % 5))
    fives = padded.unflatten(-1, (-1, 5)).to(torch.int16)
    byte = sum(fives[..., i] * 3**i for i in range(5))
    assert isinstance(byte, Tensor)
    return byte.to(torch.uint8)


def unpack_trits(stream: Tensor, columns: int) -> Tensor:
    """Undo `pack_trits`: uint8 (... x bytes) to int16 (... x columns)."""
    byte = stream.to(torch.int16)
    fives = torch.stack([byte // 3**i % 3 for i in range(5)], dim=-1)
    return fives.flatten(-2)[..., :columns]
