"""Files that are written and read without holding them in memory; large objects of a bucket in parts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resshift import storage
from resshift.storage import StorageError, StorageReason
from resshift.storage import s3 as s3_store

PART = 5 << 20  # the smallest that S3 takes


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """Two and a half parts."""
    path = tmp_path / "content.bin"
    path.write_bytes(np.random.default_rng(0).bytes(PART * 5 // 2 + 7))
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the requests that are sent; parts are small."""
    sent: list[str] = []
    request = s3_store.request

    def recorded(uri: str, options: Any, method: str, **arguments: object) -> dict[str, Any]:
        sent.append(method)
        return request(uri, options, method, **arguments)

    monkeypatch.setattr(s3_store, "request", recorded)
    monkeypatch.setattr(s3_store, "PART_BYTES", PART)
    return sent


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_file_comes_back_as_it_was(
    kind: str, content: Path, tmp_path: Path, bucket: str, calls: list[str]
) -> None:
    uri = f"{bucket}/a/b.bin" if kind == "s3" else str(tmp_path / "a" / "b.bin")
    storage.write_file(uri, str(content))
    assert storage.read_bytes(uri) == content.read_bytes()
    storage.read_file(uri, str(tmp_path / "back.bin"))
    assert (tmp_path / "back.bin").read_bytes() == content.read_bytes()
    assert calls.count("upload_part") == (3 if kind == "s3" else 0)


def test_a_small_object_is_one_request(content: Path, bucket: str, tmp_path: Path, calls: list[str]) -> None:
    for size in (0, 10):
        content.write_bytes(b"x" * size)
        storage.write_file(f"{bucket}/small", str(content))
        storage.read_file(f"{bucket}/small", str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == content.read_bytes()
    assert calls.count("put_object") == 2
    assert "create_multipart_upload" not in calls


def test_parts_grow_with_the_object_because_it_may_have_ten_thousand(
    content: Path, bucket: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "_MOST_PARTS", 2)
    storage.write_file(f"{bucket}/b.bin", str(content))
    assert calls.count("upload_part") == 2
    assert storage.read_bytes(f"{bucket}/b.bin") == content.read_bytes()


def test_an_upload_that_fails_leaves_the_object_as_it_was_and_no_parts(
    content: Path, bucket: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{bucket}/b.bin"
    storage.write_bytes(uri, b"old")
    request = s3_store.request

    def failing(uri: str, options: Any, method: str, **arguments: object) -> dict[str, Any]:
        if method == "upload_part" and arguments["PartNumber"] == 3:
            raise StorageError(uri, StorageReason.UNAVAILABLE, "away")
        return request(uri, options, method, **arguments)

    monkeypatch.setattr(s3_store, "request", failing)
    with pytest.raises(StorageError, match="away"):
        storage.write_file(uri, str(content))
    assert storage.read_bytes(uri) == b"old"
    name = bucket.removeprefix("s3://")
    left = s3_store.call(s3_store.DEFAULT, "list_multipart_uploads", Bucket=name)
    assert not left.get("Uploads")


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_what_is_missing_is_missing(kind: str, tmp_path: Path, bucket: str) -> None:
    root = bucket if kind == "s3" else str(tmp_path)
    actions: list[Callable[[], None]] = [
        lambda: storage.read_file(f"{root}/no", str(tmp_path / "to")),
        lambda: storage.write_file(f"{root}/to", str(tmp_path / "no")),
    ]
    for action in actions:
        with pytest.raises(StorageError) as caught:
            action()
        assert caught.value.reason is StorageReason.MISSING


@pytest.mark.slow
def test_copying_takes_no_memory(tmp_path: Path) -> None:
    """Three hundred megabytes of file in a process that may grow by a hundred."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(300 << 20)
    program = f"""
from resshift import storage
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
storage.write_file({str(tmp_path / "to")!r}, {str(tmp_path / "large")!r})
storage.read_file({str(tmp_path / "to")!r}, {str(tmp_path / "back")!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 << 10  # KiB
    assert (tmp_path / "back").stat().st_size == 300 << 20
