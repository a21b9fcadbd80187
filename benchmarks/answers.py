"""How fast the light commands answer, in multiples of `python -c "import sqlalchemy"`.

Interleaved, so that the machine's drift hits all alike; the median of the rounds' ratios. Uses the
latest job of the store (run `bitfront search demo` before). Goal: at most 3, and 2 s for a question
with another budget, be it of the measured maps (`query`) or of the solver (`solve`).

    python benchmarks/answers.py [ROUNDS]
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

BITFRONT = str(Path(sys.executable).parent / "bitfront")
COMMANDS = {
    "--help": [BITFRONT, "--help"],
    "front": [BITFRONT, "front"],
    "query": [BITFRONT, "query", "--max-bits", "4.5"],
    "solve": [BITFRONT, "solve", "--bits", "4.1"],
    "jobs": [BITFRONT, "jobs"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    ratios: dict[str, list[float]] = {name: [] for name in COMMANDS}
    base = []
    for _ in range(rounds):
        base.append(seconds([sys.executable, "-c", "import sqlalchemy"]))
        for name, command in COMMANDS.items():
            ratios[name].append(seconds(command) / base[-1])
    print(json.dumps({
        "import_sqlalchemy_s": round(statistics.median(base), 3),
        "ratios": {name: round(statistics.median(r), 2) for name, r in ratios.items()},
        "goal": 3,
        "seconds": {name: round(statistics.median(r) * statistics.median(base), 2)
                    for name, r in ratios.items()},
        "goal_of_another_budget_s": 2,
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
