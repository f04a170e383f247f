"""Run one job with 1 and with 3 replicas, with several drivers, and in two halves: the same bytes and the
same rows, apart from times.

python tests/chaos/sameness.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness

TIMES = {"seconds", "model_seconds", "written_at", "run", "attempts"}


def timeless(root: str) -> list[dict[str, Any]]:
    """Return the rows without what depends on the clock, by key."""
    rows = [
        {name: value for name, value in row.items() if name not in TIMES} for row in harness.all_rows(root)
    ]
    return sorted(rows, key=lambda row: row["key"])


def main() -> int:
    """Run and compare."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true")
    chosen = options.parse_args()
    count = 60 if chosen.quick else 300
    with tempfile.TemporaryDirectory(prefix="sameness-") as temporary:
        work = Path(temporary)
        source, log = str(work / "in"), work / "job.log"
        harness.make_pictures(source, count)
        (work / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
        model = ["--model", "nearest-x4@5"]
        runs = {
            "1 replica": [["--replicas", "1:1"]],
            "1 to 3 replicas": [["--replicas", "1:3"]],
            "3 replicas, 3 drivers": [["--replicas", "3:3", "--drivers", "3"]],
            "resumed": [["--replicas", "2:2", "--include", "00/*"], ["--replicas", "2:2"]],
        }
        if chosen.quick:
            del runs["1 to 3 replicas"]
        codes: list[int] = []
        found: dict[str, tuple[dict[str, str], list[dict[str, Any]]]] = {}
        for name, steps in runs.items():
            target = str(work / name.replace(" ", "-"))
            codes += [harness.run(source, target, *model, *step, log=log) for step in steps]
            found[name] = harness.outputs(target), timeless(target)
            print(f"{name}: {len(found[name][0])} outputs, {len(found[name][1])} rows")
        if any(code not in (0, 3) for code in codes):
            print(log.read_text(errors="replace")[-4000:])
    outputs, rows = next(iter(found.values()))
    result = {"pictures": count, "runs": list(runs), "outputs": len(outputs), "rows": len(rows)}
    claims = {
        "every picture has an output": len(outputs) == count and len(rows) == count + 1,
        "outputs are byte-identical": all(one == outputs for one, _ in found.values()),
        "ledgers are equal apart from times": all(one == rows for _, one in found.values()),
    }
    return harness.report(result, claims)


if __name__ == "__main__":
    sys.exit(main())
