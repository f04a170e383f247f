"""A window reads as the file does."""

from __future__ import annotations

import io

import numpy as np

from pipelines.shards.window import Window


def test_a_window_reads_and_seeks_as_a_file_in_memory_does() -> None:
    data = np.random.default_rng(0).bytes(1000)
    asked: list[tuple[int, int]] = []

    def read_range(position: int, num_bytes: int) -> memoryview:
        asked.append((position, num_bytes))
        return memoryview(data)[position : position + num_bytes]

    window, file = Window(len(data), read_range), io.BytesIO(data)
    rng = np.random.default_rng(1)
    for _ in range(300):
        whence = int(rng.integers(3))
        offset = int(rng.integers(0, 1100)) if whence == io.SEEK_SET else int(rng.integers(-900, 100))
        if (file.tell() if whence == io.SEEK_CUR else len(data)) + offset >= 0:
            assert window.seek(offset, whence) == file.seek(offset, whence)
        size = int(rng.integers(-1, 300))
        assert window.read(size) == file.read(size)
        assert window.tell() == file.tell()
    assert all(num_bytes > 0 and position + num_bytes <= len(data) for position, num_bytes in asked)


def test_a_buffered_reader_fills_its_buffer_from_a_window() -> None:
    data = bytes(range(256)) * 10
    window = Window(len(data), lambda position, num_bytes: data[position : position + num_bytes])
    reader = io.BufferedReader(window, 100)
    reader.seek(300)
    assert reader.read(70) == data[300:370]
    assert reader.read() == data[370:]
    assert reader.read() == b""
