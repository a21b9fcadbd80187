"""The README's main command, from installed packages to a printed front: seconds and memory.

Runs `bitfront search demo` in a new cache and store, samples the proportional set size of all its
processes (Ray's included; pages that several map are shared between them, so the sum counts them
once), and prints what the goals speak of: under 6 minutes, under 4 GB, at least 8 measured points.

    python benchmarks/main_command.py
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

SAMPLE_S = 0.5


def proportional_bytes(process: psutil.Process) -> int:
    """PSS of a process and all its descendants."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            rollup = Path(f"/proc/{each.pid}/smaps_rollup").read_text()
        except OSError:
            continue  # it has just ended
        total += next(1024 * int(x.split()[1]) for x in rollup.splitlines() if x.startswith("Pss:"))
    return total


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "BITFRONT_CACHE": f"{folder}/cache",
            "BITFRONT_STORE": f"sqlite:///{folder}/store.sqlite",
        }
        command = [str(Path(sys.executable).parent / "bitfront"), "search", "demo", "--json"]
        start, peak = time.monotonic(), 0
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as run:
            output: list[bytes] = []
            reader = threading.Thread(target=lambda: output.append(run.stdout.read()))
            reader.start()
            watched = psutil.Process(run.pid)
            while run.poll() is None:
                try:
                    peak = max(peak, proportional_bytes(watched))
                except psutil.NoSuchProcess:
                    break
                time.sleep(SAMPLE_S)
            reader.join()
        seconds = time.monotonic() - start
    points = json.loads(output[0])["points"]
    result = {
        "seconds": round(seconds, 1),
        "peak_pss_bytes": peak,
        "measured_points": len(points),
        "points_on_front": sum(point["on_front"] for point in points),
        "goals_met": seconds < 360 and peak < 4e9 and len(points) >= 8,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
