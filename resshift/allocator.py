"""Whether the C library keeps the pages of freed tensors and images, or gives them back.

Processes that do nothing but compute on a CPU should keep them. By default glibc gives memory back whenever
64 MB at the top of its heap are free, takes it again for the next layer, and the system clears every page:
370,000 page faults and a tenth of the CPU time of a 256-pixel tile of the first tiny-x4. With kept pages
there are none, and the process stays at its peak size.

Processes that are large for short times and then wait should give them back. By default glibc takes blocks of
up to 32 MB from heaps, one for each thread, and returns only the free top of the first heap: one small live
block there keeps hundreds of free megabytes below it, and the other heaps return nothing.
"""

from __future__ import annotations

import ctypes
import platform
import resource
from pathlib import Path

_STATM = Path("/proc/self/statm")
# mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES = 2**31 - 1  # the largest int; free memory below it is kept
_MMAP_BYTES = 2**25  # the largest value that glibc accepts; larger blocks are still mapped and given back
_SMALLEST_MAPPED_BYTES = 2**17  # initial value of glibc, which raises it as blocks are freed


def keep_freed_pages() -> bool:
    """Make this process's allocator keep freed pages; return False if the allocator is not glibc's."""
    return _set(_M_MMAP_THRESHOLD, _MMAP_BYTES) and _set(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def map_large_blocks() -> bool:
    """Make this process's allocator map every block of 128 KiB or more, and give it back when it is freed;
    return False if the allocator is not glibc's.
    """
    return _set(_M_MMAP_THRESHOLD, _SMALLEST_MAPPED_BYTES)


def give_back_freed_pages() -> bool:
    """Give the free pages between live blocks back to the system now; return False if there were none or the
    allocator is not glibc's.
    """
    # malloc_trim(3), since glibc 2.8 in the heaps of all threads; the free top goes back only of the first.
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).malloc_trim(0))


def knows_own_bytes() -> bool:
    """Tell whether `own_bytes` works on this system, which needs /proc."""
    return _STATM.exists()


def own_bytes() -> int:
    """Return the resident memory of this process in bytes, without pages of files and of shared memory such
    as Ray's object store.

    Raises:
        FileNotFoundError: The system has no /proc.
    """
    _, resident, shared, *_ = _STATM.read_text().split()
    return (int(resident) - int(shared)) * resource.getpagesize()


def _set(parameter: int, value: int) -> bool:
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(parameter, value))
