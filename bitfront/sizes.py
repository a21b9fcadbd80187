"""Sizes, times and energies as people write them (`120MB`, `8ms`, `40mJ`), to numbers and back."""

import re
from math import ceil, floor, log10

from quantization.errors import BitfrontError

UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
ENERGIES = {"j": 1.0, "mj": 1e-3, "kj": 1e3, "MJ": 1e6}  # no megajoule shall pass for a milli-
PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes of `120MB` (decimal), `1.5GiB` (binary) or a plain number."""
    match = PATTERN.fullmatch(text)
    if not match or match.group(2).upper() not in UNITS:
        raise BitfrontError(f"'{text}' is not a size; write 120MB, 1.5GiB or a number of bytes")
    return int(float(match.group(1)) * UNITS[match.group(2).upper()])


def parse_seconds(text: str) -> float:
    """Seconds of `8ms`, `250us` or `1.5s`."""
    match = PATTERN.fullmatch(text.replace("\u00b5", "u"))
    if not match or match.group(2).lower() not in TIMES or not float(match.group(1)):
        raise BitfrontError(f"'{text}' is not a time; write 8ms, 250us or 1.5s")
    return float(match.group(1)) * TIMES[match.group(2).lower()]


def parse_joules(text: str) -> float:
    """Joules of `40mJ` or `1.5J`."""
    match = PATTERN.fullmatch(text)
    unit = match and ENERGIES.get(match.group(2), ENERGIES.get(match.group(2).lower()))
    if not match or unit is None or not float(match.group(1)):
        raise BitfrontError(f"'{text}' is not an energy; write 40mJ, 1.5J or 2kJ")
    return float(match.group(1)) * unit


def raised(value: float) -> float:
    """A positive number to four digits, rounded up: a limit that a reader can give again."""
    step = 10.0 ** (floor(log10(value)) - 3)
    return ceil(value / step) * step


def show_joules(joules: float) -> str:
    """`41.3 mJ`."""
    unit, size = ("J", 1.0) if joules >= 1 else ("mJ", 1e-3)
    return f"{joules / size:.4g} {unit}"


def show_seconds(seconds: float) -> str:
    """`8.25 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e6:.4g} \u00b5s"


def show_bytes(count: float) -> str:
    """`102.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
