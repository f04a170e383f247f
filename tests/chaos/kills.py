"""Kill drivers, replicas, decoders and workers, each kind in turn, and the process of the job once; then run
the same command again, and count.

python tests/chaos/kills.py                     600 pictures, kills every 3 s, the job at a half
python tests/chaos/kills.py --quick             120 pictures
python tests/chaos/kills.py --drivers 3         with three drivers, which are killed too
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import harness


def disturb(
    pid: int, every_s: float, ready: Callable[[], bool], stop: threading.Event, kills: Counter[str], seed: int
) -> None:
    """kill -9 a process of the job from time to time, of each kind in turn."""
    rng = random.Random(seed)
    while not ready() and not stop.wait(0.5):  # while everything starts there is nothing to lose
        pass
    while not stop.wait(every_s * rng.uniform(0.7, 1.3)):
        found = harness.victims(pid)
        # The kind that was killed least, in this order: a short run reaches the drivers too.
        kinds = [kind for kind in ("driver", "replica", "decoder", "worker") if kind in dict(found).values()]
        kind = min(kinds, key=kills.__getitem__, default="")
        if kind and harness.kill(rng.choice([one for one, its in found if its == kind])):
            kills[kind] += 1


def main() -> int:
    """Run and count."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true")
    options.add_argument("--pictures", type=int)
    options.add_argument("--every-s", type=float, default=3.0)
    options.add_argument("--drivers", type=int, default=1)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    count = chosen.pictures or (120 if chosen.quick else 600)
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        work = Path(temporary)
        source, target, calm, log = str(work / "in"), str(work / "out"), str(work / "calm"), work / "job.log"
        harness.make_pictures(source, count)
        # 4 MP/s would be 1 ms a picture: the stand-in takes 100 ms, so that there is something to kill.
        arguments = ["--model", "nearest-x4@24", "--replicas", "3:3"]
        arguments += ["--drivers", str(chosen.drivers)]
        print(f"{count} pictures, a kill about every {chosen.every_s:g} s")

        def begun(before: int) -> Callable[[], bool]:
            return lambda: len(list(Path(target).glob("*/*.png"))) > before

        kills: Counter[str] = Counter()
        started = time.monotonic()
        process = harness.start(source, target, *arguments, log=log)
        stop = threading.Event()
        disturber = threading.Thread(
            target=disturb, args=(process.pid, chosen.every_s, begun(0), stop, kills, chosen.seed)
        )
        disturber.start()
        try:
            harness.wait_for_rows(target, count // 2, process)
            kills["job"] += 1
        finally:
            stop.set()
            disturber.join()
            harness.end(process)
        rows_before = len(harness.all_rows(target))
        outputs_before = len(harness.outputs(target))

        process = harness.start(source, target, *arguments, log=log)
        stop = threading.Event()
        disturber = threading.Thread(
            target=disturb,
            args=(process.pid, chosen.every_s, begun(outputs_before), stop, kills, chosen.seed + 1),
        )
        disturber.start()
        try:
            code = process.wait(600)
        finally:
            stop.set()
            disturber.join()
            harness.end(process)
        wall = time.monotonic() - started
        rows, found = harness.all_rows(target), harness.outputs(target)
        undisturbed = harness.run(source, calm, "--model", "nearest-x4", "--replicas", "2:2", log=log)
        expected = harness.outputs(calm)
        if code or undisturbed:
            print(log.read_text(errors="replace")[-6000:])

    # What the killed job had written and no row named is done again; so is what a killed worker had begun.
    repeated = outputs_before - rows_before + sum(row["attempts"] - 1 for row in rows)
    ok = {row["key"] for row in rows if row["status"] == "ok"}
    result = {
        "pictures": count,
        "drivers": chosen.drivers,
        "kills": dict(kills),
        "lost": count - len(ok),
        "duplicate_rows": harness.duplicates(rows),
        "corrupt": sum(found.get(key) != digest for key, digest in expected.items()),
        "extra_outputs": len(found.keys() - expected.keys()),
        "rows_before_job_kill": rows_before,
        "repeated_pictures": repeated,
        "repeated_per_kill": round(repeated / max(1, sum(kills.values())), 2),
        "wall_s": round(wall, 1),
    }
    claims = {
        "exit code 0": code == 0 and undisturbed == 0,
        "0 lost": not result["lost"],
        "0 duplicate rows": not result["duplicate_rows"],
        "0 corrupt: every sha256 as in the undisturbed run": not result["corrupt"]
        and not result["extra_outputs"],
        "something was killed": kills["job"] == 1 and sum(kills.values()) > 1,
        "drivers were killed": chosen.drivers == 1 or kills["driver"] > 0,
        "repeated work within one ledger part (100 rows) per kill": repeated <= 100 * sum(kills.values()),
    }
    return harness.report(result, claims)


if __name__ == "__main__":
    sys.exit(main())
