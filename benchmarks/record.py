"""Results of a benchmark: machine and commit, a dated JSON file, a readable table and one JSON line.

Every file has the command, machine and commit, because a figure is quoted only together with them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Return the machine, versions and commit of a benchmark run. Unknown values are None.

    Args:
        device: Device of the measured work.
        commit: Commit of the code, for a copy of the tree without its git directory.
    """
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    found, dirty = git_state()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command(sys.argv),
        "commit": found or commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else None,
        "gpu": properties.name if properties else None,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1) if properties else None,
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def command(argv: Sequence[str]) -> str:
    """Return a command line that can be run in another copy of the repository.

    Args:
        argv: Script and arguments, as in `sys.argv`.
    """
    script = os.path.abspath(argv[0])
    return shlex.join([Path(sys.executable).name, *map(_portable, [script, *argv[1:]])])


def _portable(argument: str) -> str:
    """Make an absolute path, or that of --name=PATH, relative to the repository. For a path that is neither
    in the repository nor beside it only the last part is kept: its folder means nothing on another machine.
    """
    option, equals, path = argument.rpartition("=")
    if not os.path.isabs(path):
        return argument
    relative = os.path.relpath(path, ROOT)
    return option + equals + (f".../{Path(path).name}" if relative.startswith("../../") else relative)


def git_state() -> tuple[str | None, bool | None]:
    """Return the commit of this tree and whether files differ from it; None without a git repository."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    return commit, bool(_output("git", "-C", str(ROOT), "status", "--porcelain")) if commit else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().split("\n")[0] or None if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def file_name(benchmark: str, where: Mapping[str, Any]) -> str:
    """Return BENCHMARK-YYYY-MM-DD-MACHINE.json, from the result of `machine`."""
    name = re.sub(r"[^a-z0-9]+", "-", str(where["gpu"] or where["cpu"]).lower()).strip("-")
    return f"{benchmark}-{where['date'][:10]}-{name}.json"


def write(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures as readable JSON; an existing file is replaced atomically. Paths inside the repository
    become relative to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(figures, indent=1).replace(f"{ROOT}/", "") + "\n")
    temporary.replace(path)


def json_line(figures: Mapping[str, Any]) -> str:
    """Return figures as one line of JSON, the last line of a benchmark's output."""
    return json.dumps(figures, separators=(",", ":"))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with fitted columns: text left-aligned, numbers right-aligned, None as a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(header, *cells, strict=True)]
    to_right = [any(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]

    def line(texts: Sequence[str]) -> str:
        return "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, to_right, strict=True)
        ).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
