"""Rows of packed codes as 32-bit words, which most kernels read."""

from torch import Tensor, int32
from torch.nn import functional

WORD = 4


def as_words(stream: Tensor) -> Tensor:
    """Rows of bytes (uint8, rows x bytes), padded to whole words (int32, rows x words)."""
    return functional.pad(stream, (0, -stream.shape[-1] % WORD)).view(int32)


def word_bytes(bits: int) -> int:
    """Bytes of as many bits in whole words."""
    return WORD * -(-bits // (8 * WORD))
