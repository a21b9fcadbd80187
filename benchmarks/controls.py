"""Whether the front beats uniform maps on text of another style than the search has seen.

Searches the demo model with calibration and search text from one file and held-out text from
another, then prints each control beside the front's best map of no more bytes.

    python benchmarks/controls.py SEARCH_TEXT HELDOUT_TEXT
"""

import json
import subprocess
import sys
from pathlib import Path

BITFRONT = str(Path(sys.executable).parent / "bitfront")


def main() -> None:
    search_text, heldout_text = sys.argv[1:3]
    result = subprocess.run(
        [BITFRONT, "search", "demo", "--calibration-text", search_text, "--search-text",
         search_text, "--heldout-text", heldout_text, "--json"],
        check=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    points = json.loads(result.stdout)["points"]
    rows = []
    for control in (p for p in points if p["control"] == "uniform"):
        rivals = [p for p in points if p["weight_bytes"] <= control["weight_bytes"]]
        best = min(rivals, key=lambda p: p["kl"])
        rows.append({
            "bits": control["average_bits"], "uniform_kl": round(control["kl"], 5),
            "front_kl": round(best["kl"], 5), "ratio": round(best["kl"] / control["kl"], 3),
            "front_point": best["id"], "control_is_on_front": control["on_front"],
        })  # fmt: skip
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
