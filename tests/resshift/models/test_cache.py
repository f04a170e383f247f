"""The cache of files from elsewhere: fetched once, whole or not at all, within its limit."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resshift.models.cache import Cache, Origin, cache_limit
from resshift.models.files import WeightsError


def origin(data: bytes, address: str = "s3://b/w.safetensors", version: str = "1", **facts: Any) -> Origin:
    return Origin(
        address=address,
        version=version,
        suffix=".safetensors",
        chunks=lambda: iter([data]),
        **facts,
    )


def never() -> Iterator[bytes]:
    raise AssertionError("fetched again")
    yield b""


def known(address: str = "s3://b/w.safetensors", version: str = "1") -> Origin:
    return Origin(address=address, version=version, suffix=".safetensors", chunks=never)


def test_a_version_is_fetched_once_and_named_by_its_content(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    path = cache.get(origin(b"one"))
    assert path.name == hashlib.sha256(b"one").hexdigest() + ".safetensors"
    assert cache.get(known()) == path
    assert cache.get(origin(b"two", version="2")).read_bytes() == b"two"
    assert path.read_bytes() == b"one"  # somebody may still read it


def test_equal_files_from_two_places_are_one(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get(origin(b"one")) == cache.get(origin(b"one", "s3://other/x.safetensors"))
    assert len(list((tmp_path / "blobs").iterdir())) == 1


def test_a_damaged_copy_is_fetched_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.get(origin(b"one")).write_bytes(b"0ne")
    assert cache.get(origin(b"one")).read_bytes() == b"one"


@pytest.mark.parametrize("facts", [{"size_bytes": 4}, {"sha256": "0" * 64}])
def test_what_is_not_the_promised_file_is_not_kept(facts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"s3://b/w\.safetensors (ended after 3 of 4|has sha256)"):
        Cache(tmp_path).get(origin(b"one", **facts))
    assert list((tmp_path / "blobs").iterdir()) == []
    assert list((tmp_path / "origins").iterdir()) == []


def test_an_interrupted_fetch_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"on"
        raise OSError("connection reset")

    broken = Origin(address="s3://b/w", version="1", suffix="", chunks=chunks)
    with pytest.raises(OSError, match="connection reset"):
        Cache(tmp_path).get(broken)
    assert list((tmp_path / "blobs").iterdir()) == []


def test_the_limit_deletes_what_was_not_used_for_longest(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=25)
    old, older, oldest = (
        cache.get(origin(data, f"s3://b/{data.decode()}")) for data in (b"a" * 10, b"b" * 10, b"c" * 3)
    )
    for path, age in ((old, 3000), (older, 4000), (oldest, 5000)):
        os.utime(path, (time.time() - age, time.time() - age))
    cache.get(known("s3://b/" + "b" * 10))  # used now
    new = cache.get(origin(b"d" * 12, "s3://b/new"))
    assert sorted(path.name for path in (tmp_path / "blobs").iterdir()) == sorted([older.name, new.name])


def test_what_is_in_use_and_what_was_asked_for_stay(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=5)
    in_use = cache.get(origin(b"a" * 10, "s3://b/a"))
    assert cache.get(origin(b"b" * 10, "s3://b/b")).is_file()  # larger than the limit
    assert in_use.is_file()


def _get(directory: Path, log: Path) -> None:
    def chunks() -> Iterator[bytes]:
        with log.open("a") as out:
            out.write("fetched\n")
        yield b"one"
        time.sleep(0.3)

    Cache(directory).get(Origin(address="s3://b/w", version="1", suffix="", chunks=chunks))


def test_processes_of_a_machine_fetch_once(tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("fork").Process(target=_get, args=(tmp_path / "cache", tmp_path / "log"))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "fetched\n"


@pytest.mark.parametrize("text", ["0", "-1", "much", "nan"])
def test_a_limit_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESSHIFT_CACHE_GB", text)
    with pytest.raises(WeightsError, match=f"RESSHIFT_CACHE_GB must be a positive number .*{text}"):
        cache_limit()


def test_the_limit_is_in_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESSHIFT_CACHE_GB", "1.5")
    assert cache_limit() == 1_500_000_000
