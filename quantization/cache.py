"""Where Bitfront keeps what can be made again: imported checkpoints, banks, reference states."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """`$BITFRONT_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("BITFRONT_CACHE") or platformdirs.user_cache_dir("bitfront"))


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, work = tempfile.mkstemp(dir=path.parent, prefix="writing-")
    os.close(descriptor)
    try:
        write(work)
        os.replace(work, path)
    finally:
        Path(work).unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """The same for a folder; one that another process has put there meanwhile stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix="writing-"))
    try:
        write(work)
        os.replace(work, folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
