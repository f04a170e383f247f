"""Write a PNG row by row: what a picture too large to hold is streamed into (PNG specification, third
edition).

Rows are filtered with "sub" (the difference to the pixel on the left) and compressed with zlib's fastest
level and run-length strategy, the choice `resshift.images.encode` makes too. The bytes depend on the
pixels only, not on how many rows come at a time.
"""

from __future__ import annotations

import struct
import zlib
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> grey, grey with alpha, RGB, RGBA
_CHUNK_BYTES = 2**18


class PngRows:
    """A PNG that is open for writing; to be closed, or used as a context.

        with path.open("wb") as file, PngRows(file, height, width, 3) as png:
            upscaler.upscale_rows(source, png.write)

    Args:
        file: open for binary writing; it is not closed.
        height: rows that will come.
        width: of a row.
        channels: 1 to 4; the second of two and the fourth are alpha.
        bits: 8 or 16.
    """

    def __init__(self, file: BinaryIO, height: int, width: int, channels: int, bits: int = 8) -> None:
        if (
            channels not in _COLOUR_TYPES
            or bits not in (8, 16)
            or not 0 < height < 2**31
            or not 0 < width < 2**31
        ):
            raise ValueError(
                f"a PNG has 1 to 4 channels of 8 or 16 bits, got {width}x{height}, {channels} channels of "
                f"{bits} bits"
            )
        self.file, self.height, self.width, self.channels, self.bits = file, height, width, channels, bits
        self.num_rows = 0
        self._deflate = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
        self._pending = bytearray()
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, _COLOUR_TYPES[channels], 0, 0, 0))

    def write(self, rows: NDArray[Any]) -> None:
        """Append rows, (n, width, channels) uint8 or uint16.

        Raises:
            ValueError: rows of another shape or dtype, or too many.
        """
        expected = np.uint8 if self.bits == 8 else np.uint16
        if (
            rows.dtype != expected
            or rows.shape[1:] != (self.width, self.channels)
            or self.num_rows + len(rows) > self.height
        ):
            raise ValueError(
                f"rows must be ({self.height - self.num_rows} or fewer, {self.width}, {self.channels}) of "
                f"{np.dtype(expected)}, "
                f"got {rows.shape} of {rows.dtype}"
            )
        samples = (
            np.ascontiguousarray(rows, dtype=">u2" if self.bits == 16 else np.uint8)
            .reshape(len(rows), -1)
            .view(np.uint8)
        )
        pixel_bytes = self.channels * self.bits // 8
        filtered = np.empty((len(rows), 1 + samples.shape[1]), np.uint8)
        filtered[:, 0] = 1
        filtered[:, 1 : 1 + pixel_bytes] = samples[:, :pixel_bytes]
        np.subtract(samples[:, pixel_bytes:], samples[:, :-pixel_bytes], out=filtered[:, 1 + pixel_bytes :])
        for row in filtered:  # row by row: the compressor's output must not depend on the height of a band
            self._pending += self._deflate.compress(row.tobytes())
            if len(self._pending) >= _CHUNK_BYTES:
                self._flush()
        self.num_rows += len(rows)

    def close(self) -> None:
        """Write the end of the file.

        Raises:
            ValueError: rows are missing.
        """
        if self.num_rows != self.height:
            raise ValueError(f"a PNG of {self.height} rows got {self.num_rows}")
        self._pending += self._deflate.flush()
        self._flush()
        self._chunk(b"IEND", b"")

    def _flush(self) -> None:
        self._chunk(b"IDAT", bytes(self._pending))
        self._pending.clear()

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self.file.write(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    def __enter__(self) -> PngRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
