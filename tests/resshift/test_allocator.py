"""What a process still holds of blocks that it has freed, in megabytes: not a matter of time or of the
machine.
"""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from resshift.allocator import give_back_freed_pages, keep_freed_pages, map_large_blocks, own_bytes

def resident_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

if sys.argv[1] == "keep":
    assert keep_freed_pages()
before = resident_mb()
blocks = [torch.ones(2**21) for _ in range(16)]  # 8 MiB each
if sys.argv[1] == "hold":
    assert abs(own_bytes() / 2**20 - resident_mb()) < 1
del blocks
if sys.argv[1] == "give back":  # 64 KiB each, below one that lives: the top of the heap is not free
    small = [b"x" * (2**16 + i) for i in range(2048)]
    last = b"x" * 2**16
    del small
    assert resident_mb() - before > 100
    assert give_back_freed_pages()
if sys.argv[1].startswith("thread"):
    if sys.argv[1] == "thread maps":
        assert map_large_blocks()

    def work():
        for size in range(1, 30):  # glibc learns to take larger ones from the thread's heap
            torch.ones(size * 2**18)

    pool = ThreadPoolExecutor(1)  # a thread that goes on living
    pool.submit(work).result()
print(resident_mb() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have their own ways")
@pytest.mark.parametrize(
    ("choice", "low", "high"),
    [
        ("default", -1, 32),
        ("hold", -1, 32),
        ("keep", 120, 160),
        ("give back", -1, 8),
        ("thread", 24, 100),
        ("thread maps", -1, 8),
    ],
)
def test_freed_pages_are_kept_when_asked(choice: str, low: float, high: float) -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM, choice], capture_output=True, text=True, check=True)
    assert low <= float(run.stdout) <= high
