"""A window of rows that moves down a plane too large to hold.

Rows are appended below and discarded above; rectangles are written, added to and read. The window lives in
memory, or in a temporary file that is mapped: then every access goes channel by channel and gives the pages
back to the system at once, so that only the disk holds them. Reading one page of a file maps sixteen, so a
rectangle of all channels of a wide plane would be resident from edge to edge.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_PART_VALUES = 2**20  # number of values that are moved or cleared at a time: 4 MiB

Allocate = Callable[[tuple[int, ...]], tuple[Tensor, Callable[[], None] | None]]


def in_memory(device: torch.device) -> Allocate:
    """Return a function that allocates zeros on `device`."""
    return lambda shape: (torch.zeros(shape, device=device), None)


def in_file(shape: tuple[int, ...]) -> tuple[Tensor, Callable[[], None]]:
    """Allocate zeros in an unnamed temporary file, in TMPDIR, which should be on a disk. The file is deleted
    with the tensor. Also return a function that gives resident pages back.
    """
    size_bytes = 4 * math.prod(shape)
    with tempfile.TemporaryFile(prefix="resshift-") as file:
        file.truncate(size_bytes)
        mapped = mmap.mmap(file.fileno(), size_bytes)
    values = torch.frombuffer(mapped, dtype=torch.float32).view(shape)
    return values, lambda: mapped.madvise(mmap.MADV_DONTNEED)


class RowBuffer:
    """Rows [top, bottom) of a plane (C, H, W), float32; new rows are zero.

    Args:
        channels: Number of channels, C.
        height: Height of the plane, H.
        width: Width of the plane, W.
        capacity: Largest number of rows alive at a time.
        allocate: Function that allocates the values: `in_memory(device)` or `in_file`.
    """

    def __init__(self, channels: int, height: int, width: int, capacity: int, allocate: Allocate) -> None:
        self.height = height
        self.top = self.bottom = 0
        self._values, self._release = allocate((channels, min(capacity, height), width))
        self._first = 0  # the row of the plane at row 0 of the values

    @property
    def width(self) -> int:
        """Width of the plane, W."""
        return self._values.shape[2]

    @property
    def num_bytes(self) -> int:
        """Size of the window in bytes."""
        return self._values.nbytes

    def extend(self, bottom: int) -> None:
        """Make rows down to `bottom` alive; new rows are zero.

        Raises:
            ValueError: More rows than the capacity would be alive.
        """
        if bottom <= self.bottom:
            return
        if bottom - self.top > self._values.shape[1]:
            raise ValueError(
                f"rows {self.top} to {bottom} do not fit into a window of {self._values.shape[1]}"
            )
        if bottom - self._first > self._values.shape[1]:
            move = self.top - self._first
            for channel, rows in self._parts(0, self.bottom - self.top):
                channel[rows] = channel[rows.start + move : rows.stop + move].clone()
                self._give_back()
            self._first = self.top
        for channel, rows in self._parts(self.bottom - self._first, bottom - self._first):
            channel[rows] = 0
            self._give_back()
        self.bottom = bottom

    def read(self, top: int, bottom: int, left: int = 0, right: int | None = None) -> Tensor:
        """Return a rectangle of rows that are alive, (C, bottom - top, right - left): a view that is valid
        until the next change, or a copy if the window lives in a file.

        Raises:
            ValueError: Some of the rows are not alive.
        """
        view = self._rect(top, bottom, left, right)
        if self._release is None:
            return view
        out = torch.empty(view.shape)
        for into, channel in zip(out, view, strict=True):
            into.copy_(channel)
            self._release()
        return out

    def write(self, top: int, left: int, values: Tensor) -> None:
        """Write (C, h, w) to the rectangle at (top, left); raises as `read` does."""
        self._change(top, left, values, Tensor.copy_)

    def add(self, top: int, left: int, values: Tensor) -> None:
        """Add (C, h, w) to the rectangle at (top, left); raises as `read` does."""
        self._change(top, left, values.to(self._values.device), Tensor.add_)

    def _change(
        self, top: int, left: int, values: Tensor, change: Callable[[Tensor, Tensor], object]
    ) -> None:
        place = self._rect(top, top + values.shape[1], left, left + values.shape[2])
        if self._release is None:
            change(place, values)
            return
        for into, channel in zip(place, values, strict=True):
            change(into, channel)
            self._release()

    def _rect(self, top: int, bottom: int, left: int, right: int | None) -> Tensor:
        if not self.top <= top < bottom <= self.bottom:
            raise ValueError(f"rows {top} to {bottom} are not all within {self.top} to {self.bottom}")
        return self._values[:, top - self._first : bottom - self._first, left:right]

    def _give_back(self) -> None:
        if self._release is not None:
            self._release()

    def _parts(self, first: int, end: int) -> Iterator[tuple[Tensor, slice]]:
        """Cut rows of all channels, top down, into parts so small that little of a mapped file is resident at
        a time, however wide the plane is.
        """
        step = max(1, _PART_VALUES // self.width)
        for channel in self._values:
            for top in range(first, end, step):
                yield channel, slice(top, min(end, top + step))

    def discard(self, before: int) -> None:
        """Discard the rows above `before`."""
        self.top = min(max(self.top, before), self.bottom)
