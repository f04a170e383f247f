"""Megabytes that a process still holds of blocks it has freed: they depend on neither time nor machine."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

# Torch is imported once; every case is a process of its own.
PROGRAM = """
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from resshift.allocator import give_back_freed_pages, keep_freed_pages, map_large_blocks, own_bytes

def resident_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

def held_mb(choice):
    if choice == "keep":
        assert keep_freed_pages()
    before = resident_mb()
    blocks = [torch.ones(2**21) for _ in range(16)]  # 8 MiB each
    if choice == "hold":
        assert abs(own_bytes() / 2**20 - resident_mb()) < 1
    del blocks
    if choice == "give back":  # 64 KiB each, below one that lives: the top of the heap is not free
        small = [b"x" * (2**16 + i) for i in range(2048)]
        last = b"x" * 2**16
        del small
        assert resident_mb() - before > 100
        assert give_back_freed_pages()
    if choice.startswith("thread"):
        if choice == "thread maps":
            assert map_large_blocks()

        def work():
            for size in range(1, 30):  # glibc learns to take larger ones from the thread's heap
                torch.ones(size * 2**18)

        pool = ThreadPoolExecutor(1)  # a thread that goes on living
        pool.submit(work).result()
    return resident_mb() - before

for choice in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        print(held_mb(choice), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, choice
"""


BOUNDS = {
    "default": (-1, 32),
    "hold": (-1, 32),
    "keep": (120, 160),
    "give back": (-1, 8),
    "thread": (24, 100),
    "thread maps": (-1, 8),
}


@pytest.fixture(scope="module")
def held_mb() -> dict[str, float]:
    command = [sys.executable, "-c", PROGRAM, json.dumps(list(BOUNDS))]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(zip(BOUNDS, map(float, told.split()), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have their own ways")
@pytest.mark.parametrize("choice", BOUNDS)
def test_freed_pages_are_kept_when_asked(choice: str, held_mb: dict[str, float]) -> None:
    low, high = BOUNDS[choice]
    assert low <= held_mb[choice] <= high
