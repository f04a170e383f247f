"""Overlays by the examples of RFC 7396, and the mistakes of the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

OVERLAY = Path(__file__).parents[2] / "deploy" / "overlay.py"


def run(*paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(OVERLAY), *map(str, paths)], capture_output=True, text=True, check=False
    )


# RFC 7396, appendix A, those whose documents are maps.
@pytest.mark.parametrize(
    ("base", "overlay", "expected"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_examples_of_the_rfc(
    base: dict[str, Any], overlay: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    files = [tmp_path / "base.yaml", tmp_path / "overlay.yaml"]
    for path, content in zip(files, (base, overlay), strict=True):
        path.write_text(yaml.safe_dump(content))
    # What is null in the base itself is a value there; the command lays the base over nothing, so only the
    # function keeps it.
    expected = {key: value for key, value in expected.items() if value is not None}
    assert yaml.safe_load(run(*files).stdout) == expected


def test_the_last_overlay_wins(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2), ("c", 3)):
        (tmp_path / name).write_text(f"x: {value}")
    assert yaml.safe_load(run(tmp_path / "a", tmp_path / "b", tmp_path / "c").stdout) == {"x": 3}


@pytest.mark.parametrize("content", ["- a list", "a: [", "just text"])
def test_a_file_that_is_no_map_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("a: 1")
    (tmp_path / "wrong.yaml").write_text(content)
    done = run(tmp_path / "base.yaml", tmp_path / "wrong.yaml")
    assert done.returncode == 2
    assert "wrong.yaml" in done.stderr
    assert done.stdout == ""


def test_a_missing_file_and_a_missing_overlay_are_refused(tmp_path: Path) -> None:
    assert "nowhere.yaml" in run(tmp_path / "nowhere.yaml", tmp_path / "x").stderr
    assert "usage" in run(tmp_path / "nowhere.yaml").stderr
