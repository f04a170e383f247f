"""Measure what scheduling costs: pictures a second, and milliseconds of CPU a picture, of a bulk job with one
or several drivers and tiny pictures that a stand-in upscales.

    python benchmarks/drivers.py --drivers 2 --objects 20000 [--replicas 2]

Pictures of 16 x 16 are files of a folder; the model repeats pixels. Start-up is excluded: figures are those
from the first part of the ledger to the last. `cpu_ms_object` is the CPU time of all drivers together,
from the kernel, over the number of pictures; that of the process of the job is in it. On a machine with few
cores, decoding, encoding and replicas compete with them: then the CPU time is what counts, not the rate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np

from pipelines.ledger import ledger

ROOT = Path(__file__).parents[1]
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its threads; 0 when it is gone."""
    try:
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def drivers_of(pid: int) -> set[int]:
    """Return the processes that schedule for a job: its own and the actors that it started."""
    parents: dict[int, int] = {}
    titles: dict[int, bytes] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes()
            except (OSError, IndexError):
                continue
    family = [pid]
    for one in family:
        family += [child for child, parent in parents.items() if parent == one]
    return {pid, *(one for one in family if titles.get(one, b"").startswith(b"ray::Driver"))}


def watch(pid: int, parts: Path, seconds: list[float], stop: threading.Event) -> None:
    """Append the CPU time of all drivers, twice a second, from the time when the ledger has a part."""
    latest: dict[int, float] = {}
    while not stop.wait(0.5):
        for one in drivers_of(pid):
            latest[one] = max(latest.get(one, 0.0), cpu_seconds(one))
        if parts.exists() and any(parts.iterdir()):
            seconds.append(sum(latest.values()))


def measure(source: str, target: str, chosen: argparse.Namespace) -> dict[str, float | int | str]:
    """Run the job once and return its figures."""
    command = [sys.executable, str(ROOT / "jobs" / "upscale.py"), source, target, "--model", "nearest-x4"]
    command += ["--replicas", str(chosen.replicas), "--drivers", str(chosen.drivers)]
    environment = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **os.environ}
    seconds: list[float] = []
    parts = Path(target) / ledger.DIRECTORY / "ledger"
    stop = threading.Event()
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    watching = threading.Thread(target=watch, args=(process.pid, parts, seconds, stop))
    watching.start()
    try:
        code = process.wait()
    finally:
        stop.set()
        watching.join()
    wall = time.monotonic() - started
    rows = ledger.read(target)
    assert code == 0, f"the job ended with {code}"
    assert set(rows["status"].to_pylist()) == {"ok"}
    assert rows.num_rows == chosen.objects == len(set(rows["key"].to_pylist()))
    # The first part is written after a hundred rows, the last one after all: what is between is counted.
    times = np.sort(rows["written_at"].to_numpy())
    later = int((times > times[0]).sum())
    return {
        "drivers": chosen.drivers,
        "objects": chosen.objects,
        "objects_per_s": round(later / max(times[-1] - times[0], 1e-9), 1),
        "cpu_ms_object": round(1000 * (seconds[-1] - seconds[0]) / max(later, 1), 3),
        "wall_s": round(wall, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> int:
    """Make pictures, run, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drivers", type=int, default=1)
    parser.add_argument("--objects", type=int, default=20_000)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--source", help="folder that keeps the pictures from one call to the next")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="drivers-") as temporary:
        source = Path(chosen.source or temporary) / f"in-{chosen.objects}"
        if not source.exists():
            for i in range(chosen.objects):
                if i % 1000 == 0:
                    (source / f"{i // 1000:03}").mkdir(parents=True)
                pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
                (source / f"{i // 1000:03}" / f"{i:06}.png").write_bytes(
                    cv2.imencode(".png", pixels)[1].tobytes()
                )
        result = measure(str(source), str(Path(temporary) / "out"), chosen)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
