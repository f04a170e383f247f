"""What a process still holds of blocks that it has freed, in megabytes: not a matter of time or of the machine."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch
from resshift.allocator import keep_freed_pages

def resident_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

if sys.argv[1] == "keep":
    assert keep_freed_pages()
before = resident_mb()
blocks = [torch.ones(2**21) for _ in range(16)]  # 8 MiB each
del blocks
print(resident_mb() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have their own ways")
@pytest.mark.parametrize(("choice", "low", "high"), [("default", -1, 32), ("keep", 120, 160)])
def test_freed_pages_are_kept_when_asked(choice: str, low: float, high: float) -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM, choice], capture_output=True, text=True, check=True)
    assert low <= float(run.stdout) <= high
