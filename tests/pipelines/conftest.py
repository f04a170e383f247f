"""Pictures that the tests of the pipelines make."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pictures import encoded


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder of ten photos in two classes, and one broken file."""
    for i in range(10):
        path = tmp_path / "photos" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
    (tmp_path / "photos" / "broken.png").write_bytes(encoded(11)[:100])
    return tmp_path / "photos"
