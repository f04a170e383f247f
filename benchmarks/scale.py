"""Measure the bulk job on simulated nodes: pictures per second with 1, 2 and 4 replicas, and with one node
killed and one added.

Every node is a raylet on this machine with one logical GPU; the model is the stand-in, which repeats pixels
and sleeps. The benchmark therefore measures the work around the GPU: scheduler, Ray, decoding, encoding.
Rates are measured from the time replicas are ready to the last picture; efficiency is the rate divided by
that of one replica and by the number of replicas. All nodes share the CPUs: if these are busy (`cpu_busy`,
including other programs), they are the limit, not the scheduler.

    python benchmarks/scale.py                      1, 2 and 4 replicas, then the killed node; some minutes
    python benchmarks/scale.py --replicas 1,2,4,8
    python benchmarks/scale.py --quick              fewer pictures

The last line is a JSON object with the main figures; the file has all figures. The exit code is 1 when an
input was lost or an output is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import record
import torch

from pipelines.cluster import ray_internals

SIDE_PX = 64
_MEGAPIXELS = SIDE_PX * SIDE_PX / 1e6
_STORE_BYTES = 100 << 20
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # no other user can reach the loopback of a benchmark
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    **ray_internals.WORKERS_NOT_NICE,
    **ray_internals.QUICK_HEALTH_CHECKS,
}


def make_pictures(folder: Path, count: int) -> None:
    """Write `count` different pictures."""
    folder.mkdir()
    for i in range(count):
        cv2.imwrite(
            str(folder / f"{i:05d}.png"),
            np.random.default_rng(i).integers(0, 256, (SIDE_PX, SIDE_PX, 3), np.uint8),
        )


def free_port() -> int:
    """Return a free port: another Ray on this machine may use the default ports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def head() -> Generator[Any]:
    """Run a head without CPUs; yield the cluster."""
    from ray.cluster_utils import Cluster

    options = {
        "num_cpus": 0,
        "object_store_memory": _STORE_BYTES,
        "include_dashboard": False,
        "dashboard_port": free_port(),
    }
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def add(cluster: Any) -> Any:
    """Add a node with a logical GPU and two logical CPUs."""
    return cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=_STORE_BYTES)


def start(
    cluster: Any, source: Path, target: Path, seconds: float, replicas: tuple[int, int], log: Path
) -> subprocess.Popen[bytes]:
    """Start the command of the bulk job on the cluster, as a user would."""
    command = [sys.executable, str(record.ROOT / "jobs" / "upscale.py"), str(source), str(target)]
    command += [
        "--model",
        f"nearest-x4@{seconds / _MEGAPIXELS:.4f}",
        "--replicas",
        f"{replicas[0]}:{replicas[1]}",
    ]
    with log.open("ab") as out:
        return subprocess.Popen(
            command, env=os.environ | {"RAY_ADDRESS": cluster.address}, stdout=out, stderr=out
        )


def rows(target: Path) -> list[dict[str, Any]]:
    """Return every row of the ledger."""
    from pipelines.ledger import ledger

    return [row for part in ledger.parts(str(target)) for row in part.to_pylist()]


def finish(
    process: subprocess.Popen[bytes], source: Path, target: Path, log: Path, timeout_s: float
) -> list[dict[str, Any]]:
    """Wait for the job and check its results: one "ok" row per input, and the expected pixels.

    Raises:
        RuntimeError: The job failed, or a row or an output is wrong; the message includes the end of the log.
    """
    try:
        code = process.wait(timeout_s)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    found = rows(target)
    counts = Counter(row["key"] for row in found if row["status"] == "ok")
    expected = {path.name for path in source.iterdir()}
    if code or set(counts) != expected:
        raise RuntimeError(
            f"exit code {code}, {len(counts)} of {len(expected)} inputs are "
            f"ok:\n{log.read_text(errors='replace')[-2000:]}"
        )
    for path in sorted(source.iterdir())[::17]:
        made, given = cv2.imread(str(target / f"{path.stem}_x4.png")), cv2.imread(str(path))
        if (
            made is None
            or given is None
            or not np.array_equal(made, given.repeat(4, axis=0).repeat(4, axis=1))
        ):
            raise RuntimeError(
                f"{path.name}: the output is not the input with every pixel repeated 4 x 4 times"
            )
    return found


def made_at(target: Path) -> list[float]:
    """Return the time at which each output was written, in order. Rows of the ledger are written in groups,
    so their times are less precise.
    """
    return sorted(path.stat().st_mtime for path in target.glob("*_x4.png"))


def run_record(target: Path) -> dict[str, Any]:
    """Return what the job recorded about its one run: replica_seconds, the time since each replica was ready,
    and busy_share, the share of it spent in the model.
    """
    from pipelines.ledger import ledger

    (path,) = (target / ledger.DIRECTORY / "runs").glob("*.json")
    return json.loads(path.read_text())


def cpu_busy(before: tuple[float, float], after: tuple[float, float]) -> float | None:
    """Return the busy share of all cores between two readings of `cpu_seconds`."""
    total = after[1] - before[1]
    return round((after[0] - before[0]) / total, 2) if total > 0 else None


def cpu_seconds() -> tuple[float, float]:
    """Return (busy, all) jiffies of the machine, including other programs; zeros if the kernel does not
    report them.
    """
    try:
        fields = [float(one) for one in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except FileNotFoundError:
        return 0.0, 0.0
    return sum(fields) - fields[3] - fields[4], sum(fields)


def scaling(
    cluster: Any, work: Path, levels: Sequence[int], per_replica: int, seconds: float
) -> list[dict[str, Any]]:
    """Run the job with each number of replicas, on the same number of nodes and with proportionally many
    pictures; keep the nodes.
    """
    results: list[dict[str, Any]] = []
    for level in levels:
        source, target, log = work / f"in-{level}", work / f"out-{level}", work / f"job-{level}.log"
        make_pictures(source, per_replica * level)
        while len(cluster.worker_nodes) < level:
            add(cluster)
        before, started = cpu_seconds(), time.monotonic()
        found = finish(
            start(cluster, source, target, seconds, (level, level), log), source, target, log, 1200
        )
        took, busy = time.monotonic() - started, cpu_busy(before, cpu_seconds())
        record_of_run = run_record(target)
        # Over the lifetime of the replicas, including the first and last unit: the times of outputs alone
        # would hide a slow start. Serve takes seconds to end replicas, which no picture waits for.
        ending_s = record_of_run["ended"] - made_at(target)[-1]
        rate = len(found) * level / (record_of_run["replica_seconds"] - level * ending_s)
        base = results[0]["pictures_per_s"] if results else rate
        efficiency = rate / base / level * levels[0]
        results.append(
            {
                "replicas": level,
                "pictures": len(found),
                "pictures_per_s": round(rate, 2),
                "of_ideal": round(rate * seconds / level, 3),
                "efficiency": round(efficiency, 3),
                "busy_share": round(record_of_run["busy_share"], 3),
                "seconds": round(took, 1),
                "cpu_busy": busy,
            }
        )
    return results


def loss_and_gain(cluster: Any, work: Path, count: int, seconds: float) -> dict[str, Any]:
    """Kill one of two nodes during a job, then add one; no input may be lost."""
    source, target, log = work / "in-loss", work / "out-loss", work / "job-loss.log"
    make_pictures(source, count)
    while len(cluster.worker_nodes) < 2:
        add(cluster)
    while len(cluster.worker_nodes) > 2:
        cluster.remove_node(next(iter(cluster.worker_nodes)))
    process = start(cluster, source, target, seconds, (2, 2), log)
    _wait_for_outputs(process, target, count // 4, log)
    killed_at, had = time.time(), len(made_at(target))
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    add(cluster)
    found = finish(process, source, target, log, 1200)
    later = [when for when in made_at(target) if when > killed_at]
    gaps = [b - a for a, b in zip([killed_at, *later], later, strict=False)]
    return {
        "outputs_when_killed": had,
        "rows": len(found),
        "rows_twice": len(found) - len({row["key"] for row in found}),
        "inputs_tried_again": sum(row["attempts"] > 1 for row in found),
        "longest_pause_s": round(max(gaps), 1) if gaps else None,
    }


def _wait_for_outputs(
    process: subprocess.Popen[bytes], target: Path, count: int, log: Path, timeout_s: float = 600
) -> None:
    deadline = time.monotonic() + timeout_s
    while len(made_at(target)) < count:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(
                f"the job did not make {count} outputs:\n{log.read_text(errors='replace')[-2000:]}"
            )
        time.sleep(0.2)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed options."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", 1)[0], epilog="example: benchmarks/scale.py --quick --write"
    )
    parser.add_argument(
        "--replicas",
        default="1,2,4",
        help="numbers of replicas; the smallest is the baseline of the efficiency (1,2,4)",
    )
    parser.add_argument("--pictures", type=int, help="pictures for each replica (200; with --quick 96)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="seconds that the stand-in sleeps for each picture (0.5)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer pictures")
    parser.add_argument(
        "--out",
        type=Path,
        default=record.RESULTS,
        metavar="DIR",
        help="directory of the JSON file (benchmarks/results)",
    )
    parser.add_argument("--write", action="store_true", help="write the file")
    parser.add_argument("--commit", help="commit to record if the tree has no git directory")
    options = parser.parse_args(argv)
    options.pictures = options.pictures or (96 if options.quick else 200)
    options.replicas = sorted({int(one) for one in options.replicas.split(",")})
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables, write the file on request; return 0, or 1 when a check failed."""
    options = parse(argv)
    os.environ.update(ENVIRONMENT)
    where = record.machine(torch.device("cpu"), options.commit)
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    print(" ".join(f"{key}={value}" for key, value in (where | {"load_average": load}).items()))
    # /tmp, whatever TMPDIR is: the paths of Ray's sockets may have at most 107 bytes. A separate folder keeps
    # the files of other clusters untouched.
    with tempfile.TemporaryDirectory(prefix="scale-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        try:
            with head() as cluster:
                levels = scaling(cluster, Path(folder), options.replicas, options.pictures, options.seconds)
                print(
                    f"\nstand-in: {options.seconds} s per picture, {options.pictures} pictures per replica\n"
                )
                print(record.table(list(levels[0]), [list(level.values()) for level in levels]), flush=True)
                loss = loss_and_gain(cluster, Path(folder), 2 * options.pictures, options.seconds)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print("\none of two nodes killed, one added\n")
    print(record.table(["figure", "value"], [[name, value] for name, value in loss.items()]) + "\n")
    summary = {
        "efficiency": {str(level["replicas"]): level["efficiency"] for level in levels},
        "lost": 0,
        **loss,
    }
    settings = {"seconds_per_picture": options.seconds, "pictures_per_replica": options.pictures}
    figures = {
        "benchmark": "scale",
        "machine": where,
        "load_average": load,
        **settings,
        "levels": levels,
        "node_loss": loss,
    }
    if options.write:
        record.write(options.out / record.file_name("scale", where), figures)
    print(record.json_line(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
