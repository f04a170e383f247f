"""A part of a file, or a file of which a part is in memory, as a file object."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class Window(io.RawIOBase):
    """A file object over a function.

    Args:
        size_bytes: Size of the file.
        read_range: Function of (position, number of bytes) that returns these bytes of the file.
    """

    def __init__(self, size_bytes: int, read_range: Callable[[int, int], bytes | memoryview]) -> None:
        super().__init__()
        self._size_bytes, self._read_range = size_bytes, read_range
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size_bytes - self._position)
        num_bytes = left if size < 0 else min(size, left)
        data = bytes(self._read_range(self._position, num_bytes)) if num_bytes else b""
        self._position += len(data)
        return data

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        data = self.read(len(target))
        target[: len(data)] = data
        return len(data)
