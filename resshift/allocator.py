"""What the C library does with the pages of freed tensors and images: keep them all, or give them all back.

To keep them is for processes that do nothing but compute on a CPU. By itself glibc gives memory back whenever
64 MB at the top of its heap are free and takes it again for the next layer, and the system clears every page:
370,000 page faults and a tenth of the CPU time of a 256-pixel tile of the first tiny-x4. Kept, they are none.
What a process holds then is its peak.

To give them back is for processes that are large for moments, and then wait. By itself glibc takes blocks of
up to 32 MB from heaps, one for each thread, and returns only what lies at the top of the first of them: one
small block there that still lives holds hundreds of free megabytes below it, and the others keep what they
have.
"""

from __future__ import annotations

import ctypes
import platform
import resource
from pathlib import Path

_STATM = Path("/proc/self/statm")
# mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES = 2**31 - 1  # an int; free memory below it is kept
_MMAP_BYTES = 2**25  # the most that glibc accepts; larger blocks are mapped and given back as before
_SMALLEST_MAPPED_BYTES = 2**17  # where glibc begins, before it learns from what is freed


def keep_freed_pages() -> bool:
    """Tell this process's allocator to keep them; False where it is not glibc's, which has its own ways."""
    return _set(_M_MMAP_THRESHOLD, _MMAP_BYTES) and _set(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def map_large_blocks() -> bool:
    """Tell this process's allocator to take every block of 128 KiB or more from the system and give it back
    when it is freed.
    """
    return _set(_M_MMAP_THRESHOLD, _SMALLEST_MAPPED_BYTES)


def give_back_freed_pages() -> bool:
    """Return the free pages between blocks that live to the system, now; False where there were none, or the
    allocator is not glibc's.
    """
    # malloc_trim(3): since glibc 2.8 in the heaps of all threads. What is free at their top stays, but for
    # the first.
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).malloc_trim(0))


def knows_own_bytes() -> bool:
    """Return whether `own_bytes` can tell: where there is a /proc."""
    return _STATM.exists()


def own_bytes() -> int:
    """Return the resident memory that is this process's alone, without pages of files and of shared memory
    such as Ray's object store.

    Raises:
        FileNotFoundError: the system has no /proc.
    """
    _, resident, shared, *_ = _STATM.read_text().split()
    return (int(resident) - int(shared)) * resource.getpagesize()


def _set(parameter: int, value: int) -> bool:
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(parameter, value))
