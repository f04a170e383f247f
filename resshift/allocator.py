"""Let the C library keep the pages of freed tensors and images, for processes that do nothing but compute on a CPU.

glibc gives memory back whenever 64 MB at the top of its heap are free and takes it again for the next layer, and the system clears every
page: 370,000 page faults and a tenth of the CPU time of a 256-pixel tile of the first tiny-x4. Kept, they are none. What a process holds
then is its peak.
"""

from __future__ import annotations

import ctypes
import platform

# mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES = 2**31 - 1  # an int; free memory below it is kept
_MMAP_BYTES = 2**25  # the most that glibc accepts; larger blocks are mapped and given back as before


def keep_freed_pages() -> bool:
    """Tell this process's allocator; False where it is not glibc's, which has its own ways."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))
