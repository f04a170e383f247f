"""A PNG that is written by rows is the picture."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest

from resshift import images
from resshift.images.pngrows import PngRows


def written(pixels: np.ndarray, band: int) -> bytes:
    file = io.BytesIO()
    with PngRows(file, *pixels.shape, bits=8 * pixels.itemsize) as png:
        for top in range(0, len(pixels), band):
            png.write(pixels[top : top + band])
    return file.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_decoders_read_what_was_written(dtype: type, channels: int) -> None:
    pixels = np.random.default_rng(channels).integers(
        0, np.iinfo(dtype).max, (37, 21, channels), dtype, endpoint=True
    )
    data = written(pixels, 5)
    assert data == written(pixels, 37)
    picture = images.decode(data)
    assert np.array_equal(picture.pixels, pixels[..., : 1 if channels < 3 else 3])
    if channels in (2, 4):
        assert picture.alpha is not None
        assert np.array_equal(picture.alpha, pixels[..., -1])


def test_more_than_a_chunk_of_data() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (700, 300, 3), np.uint8)
    data = written(pixels, 64)
    assert data.count(b"IDAT") > 1
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    assert np.array_equal(decoded[..., ::-1], pixels)


def test_wrong_rows_are_named() -> None:
    png = PngRows(io.BytesIO(), 3, 4, 3)
    with pytest.raises(ValueError, match=r"must be \(3 or fewer, 4, 3\) of uint8, got \(1, 5, 3\)"):
        png.write(np.zeros((1, 5, 3), np.uint8))
    png.write(np.zeros((2, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="got 2"):
        png.close()
    with pytest.raises(ValueError, match="5 channels"):
        PngRows(io.BytesIO(), 3, 4, 5)
