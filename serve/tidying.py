"""A gateway's memory after large pictures: what is free goes back to the system, soon and wherever it lies.

Bodies, pixels and results come and go in many threads, and blocks that stay lie between them. After the files
and bodies of tests/chaos/hostile_http.py a gateway of 154 MB has 164 to 167; with only free pages given back
404, without either 399.
"""

from __future__ import annotations

import asyncio

from resshift.allocator import give_back_freed_pages, knows_own_bytes, map_large_blocks, own_bytes

_EVERY_S = 2.0
_GROWTH_BYTES = 16 * 2**20  # since the last time: below, nothing worth the work can have become free


async def tidy() -> None:
    """Give back freed blocks at once where they are large, and other free pages from time to time, until
    cancelled.

    Does nothing where the system does not tell what a process holds.
    """
    if not knows_own_bytes():
        return
    map_large_blocks()
    least = own_bytes()
    while True:
        await asyncio.sleep(_EVERY_S)
        if own_bytes() > least + _GROWTH_BYTES:
            await asyncio.to_thread(give_back_freed_pages)  # without the interpreter's lock
            least = own_bytes()
