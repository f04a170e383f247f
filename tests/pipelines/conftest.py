"""Pictures that the tests of the pipelines make."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Encode = Callable[..., bytes]


@pytest.fixture
def encode() -> Encode:
    """Return a function that makes an encoded picture: `encode(seed, height, width, "PNG")`."""

    def make(seed: int = 0, height: int = 40, width: int = 48, format: str = "PNG", **options: Any) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format, **options)
        return out.getvalue()

    return make


@pytest.fixture
def tree(tmp_path: Path, encode: Encode) -> Path:
    """Return a folder of ten photos in two classes, and one broken file."""
    for i in range(10):
        path = tmp_path / "photos" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(i))
    (tmp_path / "photos" / "broken.png").write_bytes(encode(11)[:100])
    return tmp_path / "photos"
