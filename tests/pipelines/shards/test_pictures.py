"""Pictures are read as Arrow reads them, a request for each row group."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.shards import pictures
from pipelines.shards.parquet import RowGroup, read_manifest, row_groups, write_shard_file
from pipelines.shards.pictures import Photo, read_pictures
from pipelines.shards.prepare import finish
from resshift import storage
from resshift.storage import StorageError, StorageReason

Asked = list[tuple[str, int]]


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Return shards of all that pages can be: nulls, empty values, megabytes, other alphabets."""
    rng = np.random.default_rng(0)

    def rows(name: str) -> Iterator[dict[str, object]]:
        sizes = [0, 1, 100, 1 << 20, 70_000, 3_000_000, *rng.integers(0, 200_000, 40).tolist()]
        for i, size in enumerate(sizes):
            row: dict[str, object] = {"key": f"{name}/ß é 图 {i}", "sha256": f"{name} {i % 40}"}
            if i % 7 == 3:
                yield row | {"status": "failed", "reason": "truncated", "message": "half of it" * 50}
            else:
                yield row | {"status": "ok", "reason": "", "width": i, "bytes": rng.bytes(size)}

    names = ("a.parquet", "b.parquet")
    shards = [write_shard_file(str(tmp_path), name, "f", rows(name), 16, 4 << 20) for name in names]
    finish(shards, "nowhere", str(tmp_path))
    return str(tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Return the list of (file, offset) that is filled by each request."""
    found: Asked = []
    read: Callable[..., bytes] = storage.read_range

    def counted(uri: str, offset: int, num_bytes: int) -> bytes:
        found.append((Path(uri).name, offset))
        return read(uri, offset, num_bytes)

    monkeypatch.setattr(storage, "read_range", counted)
    return found


def as_arrow_reads(root: str, group: RowGroup) -> list[Photo]:
    rows = pq.ParquetFile(Path(root) / group.shard).read_row_group(group.index).to_pylist()
    used = [row for i, row in enumerate(rows) if row["status"] == "ok" and i not in group.duplicates]
    return [Photo(row["key"], row["bytes"]) for row in used]


def without_spans(root: str) -> list[RowGroup]:
    """Return the row groups of a data set whose manifest is of before there were spans."""
    path = Path(root) / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        del shard["spans"]
    path.write_text(json.dumps(manifest))
    pictures._kept_spans.cache_clear()  # pyright: ignore[reportPrivateUsage]
    return row_groups(read_manifest(root))


def test_pictures_are_those_that_arrow_reads_by_one_request_each(root: str, asked: Asked) -> None:
    groups = row_groups(read_manifest(root))
    assert len(groups) == 6
    assert any(group.duplicates for group in groups)
    assert [read_pictures(root, group) for group in groups] == [as_arrow_reads(root, g) for g in groups]
    assert asked == [(group.shard, group.span[0]) for group in groups if group.span is not None]


def test_of_older_manifests_the_end_of_each_shard_is_read_once(root: str, asked: Asked) -> None:
    groups = without_spans(root)
    assert [read_pictures(root, group) for group in groups] == [as_arrow_reads(root, g) for g in groups]
    assert len(asked) == len(groups) + 2
    assert [name for name, offset in asked if offset < 0] == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize("where", ["header", "length", "end", "rows"])
def test_damage_is_an_error_of_storage(root: str, where: str) -> None:
    group = row_groups(read_manifest(root))[0]
    assert group.span is not None
    path, (start, stop), num_rows = Path(root) / group.shard, group.span, group.num_rows
    data = bytearray(path.read_bytes())
    if where == "header":
        data[start] = 0xFF
    elif where == "length":
        at = data.index(b"a.parquet/", start) - 4  # of the first key
        data[at : at + 4] = b"\xff\xff\xff\x00"
    elif where == "end":
        stop -= 1
    else:
        num_rows += 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="row group 0 is damaged") as raised:
        read_pictures(root, RowGroup(group.shard, 0, group.num_ok, (), num_rows, (start, stop)))
    assert raised.value.reason is StorageReason.INVALID
