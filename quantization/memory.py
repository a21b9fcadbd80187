"""Freed memory, given back to the system."""

import ctypes
import gc
from contextlib import suppress


def return_memory() -> None:
    """Collect garbage and trim the heap: glibc keeps gigabytes of a torn one otherwise."""
    gc.collect()
    trim()


def trim() -> None:
    """Only trim the heap: a few milliseconds."""
    with suppress(OSError, AttributeError):  # another C library has nothing to trim
        ctypes.CDLL(None).malloc_trim(0)
