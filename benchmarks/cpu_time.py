"""CPU seconds of this process and all that it has started, by what they do: unlike wall time, they hardly
depend on what else the machine runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

KINDS = ("driver", "tasks", "actors", "daemons", "other")
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_by_kind() -> dict[str, float]:
    """Return CPU seconds so far of the living processes. Kinds:

    driver: this process, which plans and consumes.
    tasks: workers of Ray that run tasks, or have.
    actors: workers of Ray that are actors: those that deal blocks, and Ray's own.
    daemons: raylets, the GCS and their agents.
    other: whatever else this process has started.
    """
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                continue
            parents[int(path.name)] = int(fields[1])
            seconds[int(path.name)] = (int(fields[11]) + int(fields[12])) / _TICKS
    found: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for pid in seconds:
        ancestor = pid
        while ancestor not in (os.getpid(), 0):
            ancestor = parents.get(ancestor, 0)
        if ancestor:
            found[_kind(pid)] += seconds[pid]
    return found


def since(before: Mapping[str, float]) -> dict[str, float]:
    """Return CPU seconds since an answer of `cpu_by_kind`."""
    return {kind: seconds - before[kind] for kind, seconds in cpu_by_kind().items()}


def _kind(pid: int) -> str:
    if pid == os.getpid():
        return "driver"
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "other"
    if title.startswith("ray::"):
        return "tasks" if title.startswith(("ray::IDLE", "ray::Read", "ray::_map_task")) else "actors"
    return "daemons" if "/ray/" in title else "other"
