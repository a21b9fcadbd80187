"""`bitfront ARGUMENTS` in a process of its own, forked off one that has done the imports.

Starting Python and importing torch, transformers and Ray takes seconds, most of what a command that
refuses its input takes. What runs is the installed command's `main`, streams and status included.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

LONGEST_S = 600
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "bitfront.cli",
        "bitfront.pipeline",
        "bitfront.exporting",
        "bitfront.profiling",
        "transformers",
    ]
)


def run_command(arguments: Sequence[str]) -> subprocess.CompletedProcess:
    """As `subprocess.run([bitfront, *arguments], capture_output=True, text=True)`."""
    with TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        process = FORKS.Process(target=_main, args=(list(arguments), streams, dict(os.environ)))
        process.start()
        process.join(LONGEST_S)
        assert process.exitcode is not None, f"{arguments} took more than {LONGEST_S} s"
        found = [stream.read_text(encoding="utf-8") for stream in streams]
    return subprocess.CompletedProcess(arguments, process.exitcode, *found)


def _main(arguments: list[str], streams: list[Path], environment: dict[str, str]) -> None:
    for descriptor, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["bitfront", *arguments]
    from bitfront.cli import main

    main()
