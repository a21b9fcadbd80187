"""Sizes as people write them (`120MB`, `1.5GiB`), to bytes and back."""

import re

from quantization.errors import BitfrontError

UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes of `120MB` (decimal), `1.5GiB` (binary) or a plain number."""
    match = PATTERN.fullmatch(text)
    if not match or match.group(2).upper() not in UNITS:
        raise BitfrontError(f"'{text}' is not a size; write 120MB, 1.5GiB or a number of bytes")
    return int(float(match.group(1)) * UNITS[match.group(2).upper()])


def show_bytes(count: float) -> str:
    """`102.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
