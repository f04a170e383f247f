"""What a benchmark leaves behind: on which machine and code it ran, a dated JSON file, a readable table, one
JSON line.

A number without its command, machine and commit is not quoted anywhere, so all of them are in every file.
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
    """Return where and with what a benchmark runs. What cannot be found out is None.

    Args:
        device: that the work runs on.
        commit: of the code, for a tree that is a copy without its git directory.
    """
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    found, dirty = git_state()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
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


def git_state() -> tuple[str | None, bool | None]:
    """Return the commit of this tree and whether files differ from it; None where there is no git
    repository.
    """
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
    """Return BENCHMARK-YYYY-MM-DD-MACHINE.json for what `machine` returned."""
    name = re.sub(r"[^a-z0-9]+", "-", str(where["gpu"] or where["cpu"]).lower()).strip("-")
    return f"{benchmark}-{where['date'][:10]}-{name}.json"


def write(path: Path, figures: Mapping[str, Any]) -> None:
    """Store figures as readable JSON; a file that is there is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(figures, indent=1) + "\n")
    temporary.replace(path)


def json_line(figures: Mapping[str, Any]) -> str:
    """Return figures as the one line that ends a benchmark's output."""
    return json.dumps(figures, separators=(",", ":"))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with columns as wide as they need: text to the left, numbers to the right, None as a
    dash.
    """
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
