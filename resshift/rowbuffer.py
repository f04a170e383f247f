"""A window of rows that moves down a plane too large to hold.

Rows are appended below (or added to), read by rectangles, and given up from above. The window lives in memory, or in a temporary file that
is mapped: then `release` hands its pages back to the system, so that they take no memory between uses, and the disk holds them.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

Allocate = Callable[[tuple[int, ...]], tuple[Tensor, Callable[[], None]]]


def in_memory(device: torch.device) -> Allocate:
    """Return an allocator of zeros on `device`."""
    return lambda shape: (torch.zeros(shape, device=device), lambda: None)


def in_file(shape: tuple[int, ...]) -> tuple[Tensor, Callable[[], None]]:
    """Allocate zeros in an unnamed temporary file (in TMPDIR, which should be on a disk); it goes when the tensor goes."""
    size_bytes = 4 * math.prod(shape)
    with tempfile.TemporaryFile(prefix="resshift-") as file:
        file.truncate(size_bytes)
        mapped = mmap.mmap(file.fileno(), size_bytes)
    values = torch.frombuffer(mapped, dtype=torch.float32).view(shape)
    return values, lambda: mapped.madvise(mmap.MADV_DONTNEED)


class RowBuffer:
    """Rows [top, bottom) of a plane (C, H, W), float32; new rows are zero.

    Args:
        channels: C.
        height: H.
        width: W.
        capacity: most rows alive at a time.
        allocate: where they live.
    """

    def __init__(self, channels: int, height: int, width: int, capacity: int, allocate: Allocate) -> None:
        self.height = height
        self.top = self.bottom = 0
        self._values, self.release = allocate((channels, min(capacity, height), width))
        self._first = 0  # the row of the plane at row 0 of the values

    @property
    def width(self) -> int:
        """W."""
        return self._values.shape[2]

    def extend(self, bottom: int) -> None:
        """Make rows down to `bottom` alive; those that were not are zero.

        Raises:
            ValueError: more rows than the capacity.
        """
        if bottom <= self.bottom:
            return
        if bottom - self.top > self._values.shape[1]:
            raise ValueError(f"rows {self.top} to {bottom} do not fit into a window of {self._values.shape[1]}")
        if bottom - self._first > self._values.shape[1]:
            begin, end = self.top - self._first, self.bottom - self._first
            for channel in self._values:  # one by one: the copy is small, and of a mapped file little is resident at a time
                channel[: end - begin] = channel[begin:end].clone()
                self.release()
            self._first = self.top
        for channel in self._values:
            channel[self.bottom - self._first : bottom - self._first] = 0
            self.release()
        self.bottom = bottom

    def rect(self, top: int, bottom: int, left: int = 0, right: int | None = None) -> Tensor:
        """Return a view (C, bottom - top, right - left) of rows that are alive.

        Raises:
            ValueError: some are not.
        """
        if not self.top <= top < bottom <= self.bottom:
            raise ValueError(f"rows {top} to {bottom} are not all within {self.top} to {self.bottom}")
        return self._values[:, top - self._first : bottom - self._first, left:right]

    def discard(self, before: int) -> None:
        """Give up the rows above `before`."""
        self.top = min(max(self.top, before), self.bottom)
