"""What the chaos scripts share: pictures, the command as a process, its descendants, and what is left
behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from pipelines.cluster import ray_internals
from pipelines.ledger import ledger
from resshift import storage
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    **ray_internals.WORKERS_NOT_NICE,
    "OMP_NUM_THREADS": "1",
}


def make_pictures(root: str, count: int, side_px: int = 64) -> None:
    """Write `count` different PNG pictures into folders of fifty."""
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (side_px, side_px + i % 7, 3), np.uint8)
        storage.write_bytes(f"{root}/{i // 50:02d}/{i:05d}.png", cv2.imencode(".png", pixels)[1].tobytes())


def command(source: str, target: str, *arguments: str) -> list[str]:
    """Return the bulk job as a command line."""
    return [sys.executable, str(ROOT / "jobs" / "upscale.py"), source, target, *arguments]


def start(source: str, target: str, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Start the job in a session of its own."""
    with log.open("ab") as out:
        return subprocess.Popen(
            command(source, target, *arguments),
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def run(source: str, target: str, *arguments: str, log: Path, timeout_s: float = 600) -> int:
    """Run the job to its end and return its exit code."""
    process = start(source, target, *arguments, log=log)
    try:
        return process.wait(timeout_s)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the job and everything that it started."""
    left = descendants(process.pid)
    if process.poll() is None:
        process.kill()
        process.wait()
    for pid in left:
        kill(pid)


def kill(pid: int) -> bool:
    """kill -9; False when it is gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _parents() -> dict[int, int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    return parents


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and theirs."""
    parents, found = _parents(), [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def title(pid: int) -> str:
    """Return the command line of a process, "" when it is gone."""
    try:
        return (
            (Path("/proc") / str(pid) / "cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode("utf-8", "replace")
            .strip()
        )
    except OSError:
        return ""


def victims(pid: int) -> list[tuple[int, str]]:
    """Return (pid, kind) of the replicas, CPU workers, decoders and drivers with processes of their own: all
    but Ray's own services and the job itself.
    """
    kinds = {
        "ray::ServeReplica": "replica",
        "ray::_prepare": "worker",
        "ray::_store": "worker",
        "ray::Driver": "driver",
    }
    found = [(one, title(one)) for one in descendants(pid)]
    named = [
        (one, next((kind for start, kind in kinds.items() if text.startswith(start)), ""))
        for one, text in found
    ]
    named += [(one, "decoder") for one, text in found if "resshift.images.confined" in text]
    return [(one, kind) for one, kind in named if kind]


def outputs(root: str) -> dict[str, str]:
    """Return the sha256 of every output below DST."""
    return {
        entry.key: hashlib.sha256(storage.read_bytes(entry.uri)).hexdigest()
        for entry in storage.list_entries(root)
        if not entry.key.startswith(f"{ledger.DIRECTORY}/")
    }


def all_rows(root: str) -> list[dict[str, Any]]:
    """Return every row of every part, superseded ones included."""
    return [row for part in ledger.parts(root) for row in part.to_pylist()]


def duplicates(rows: list[dict[str, Any]]) -> int:
    """Return how many rows say again what another row of the same key and version says."""
    return sum(count - 1 for count in Counter((row["key"], row["etag"]) for row in rows).values())


def wait_for_rows(root: str, count: int, process: subprocess.Popen[bytes], timeout_s: float = 300) -> None:
    """Wait until the ledger has so many rows."""
    deadline = time.monotonic() + timeout_s
    while len(all_rows(root)) < count:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the job ended ({process.poll()}) before it had {count} rows")
        time.sleep(0.5)


def report(result: dict[str, Any], claims: dict[str, bool]) -> int:
    """Print the claims and, last, one line of JSON; return the exit code."""
    for name, holds in claims.items():
        print(f"{'ok  ' if holds else 'FAIL'} {name}")
    print(json.dumps(result | {"passed": all(claims.values())}))
    return 0 if all(claims.values()) else 1


@contextlib.contextmanager
def endpoint(
    work: Path, change: Callable[[Any], None], *arguments: str
) -> Generator[tuple[subprocess.Popen[bytes], int, Any]]:
    """Run an endpoint in a session of its own while the block lasts; it has been started when the block
    begins, and may not be ready.

    Args:
        work: Folder for its configuration and log.
        change: Function that changes the configuration which `python -m serve --print-config` gives for the
            arguments.
        arguments: Arguments of `python -m serve`.

    Yields:
        The process, the port, and the configuration.
    """
    port = free_port()
    command = [sys.executable, "-m", "serve", *arguments, "--port", str(port), "--print-config"]
    config: Any = yaml.safe_load(
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    )
    change(config)
    (work / "serve.yaml").write_text(yaml.safe_dump(config))
    with (work / "serve.log").open("wb") as log:
        command = [sys.executable, "-m", "serve", "--config", str(work / "serve.yaml")]
        environment = os.environ | ENVIRONMENT
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield server, port, config
    finally:
        end(server)
