"""Where Bitfront keeps what can be made again: imported checkpoints, banks, reference states."""

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """`$BITFRONT_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("BITFRONT_CACHE") or platformdirs.user_cache_dir("bitfront"))
