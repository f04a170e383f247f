"""One data set from a folder, a tar of class tars and a bucket; what the user is shown."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipelines.shards.parquet import STATUS_SCHEMA, read_manifest, row_groups
from pipelines.shards.pictures import Photo, read_pictures
from pipelines.shards.status import report
from resshift import storage
from tests.pictures import encoded

Job = Callable[..., int]


def pictures(root: str) -> list[Photo]:
    """Return all that training would read, in the order of the shards."""
    return [photo for group in row_groups(read_manifest(root)) for photo in read_pictures(root, group)]


def as_class_tars(tree: Path) -> bytes:
    """Pack a folder as ILSVRC2012_img_train.tar is packed."""
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w") as tar:
        for folder in sorted(path for path in tree.iterdir() if path.is_dir()):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as class_tar:
                for path in sorted(folder.iterdir()):
                    class_tar.add(path, arcname=path.name)
            info = tarfile.TarInfo(f"{folder.name}.tar")
            info.size = inner.tell()
            tar.addfile(info, io.BytesIO(inner.getvalue()))
    return outer.getvalue()


@pytest.mark.ray
@pytest.mark.timeout(600)  # Ray workers take minutes to start on a busy machine
@pytest.mark.usefixtures("ray_cluster")
def test_folder_tar_and_bucket_give_the_same_data_set(
    tree: Path, tmp_path: Path, bucket: str, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "broken.png").unlink()
    (tree / "class1" / "cut.png").write_bytes(encoded(20)[:100])
    (tree / "class0" / "again.png").write_bytes((tree / "class0" / "8.png").read_bytes())
    for path in tree.rglob("*.png"):
        storage.write_bytes(f"{bucket}/photos/{path.relative_to(tree)}", path.read_bytes())
    data = as_class_tars(tree)
    storage.write_bytes(f"{bucket}/train.tar", data)
    (tmp_path / "train.tar").write_bytes(data)

    sources = {str(tree): str(tmp_path / "a"), str(tmp_path / "train.tar"): str(tmp_path / "b")}
    sources |= {f"{bucket}/photos": f"{bucket}/c", f"{bucket}/train.tar": f"{bucket}/d"}
    for source, root in sources.items():
        assert job("prepare", source, root) == 3
        shown = capsys.readouterr().out
        assert f"ok 10, skipped {4 if source.endswith('.tar') else 1}, failed 1, shards reused 0" in shown
        assert "truncated" in shown
        assert "duplicate" in shown
    first, *others = (pictures(root) for root in sources.values())
    assert len(first) == 10
    assert [other == first for other in others] == [True] * 3
    status = pq.read_table(tmp_path / "b" / "status.parquet").to_pylist()
    assert {(r["key"], r["reason"], r["message"]) for r in status if r["status"] == "skipped"} == {
        ("train.tar", "archive", "2 members"),
        ("class0.tar", "archive", "6 members"),
        ("class1.tar", "archive", "6 members"),
        ("class0/again.png", "duplicate", "same bytes as class0/8.png"),
    }

    before = storage.read_bytes(f"{bucket}/d/manifest.json")
    assert job("prepare", f"{bucket}/train.tar", f"{bucket}/d") == 3
    assert "shards reused 1" in capsys.readouterr().out
    assert storage.read_bytes(f"{bucket}/d/manifest.json") == before
    assert job("prepare", f"{bucket}/train.tar", f"{bucket}/e", "--dry-run") == 0
    assert "15 inputs" in capsys.readouterr().out
    assert list(storage.list_entries(f"{bucket}/e")) == []


def test_report_counts_outcomes_sizes_modes_and_oddities() -> None:
    def row(
        status: str, reason: str, side: int = 100, mode: str = "RGB", message: str = ""
    ) -> dict[str, Any]:
        known = {
            "status": status,
            "reason": reason,
            "message": message,
            "width": side,
            "height": 500,
            "mode": mode,
            "size_bytes": 10**6,
        }
        return dict.fromkeys(STATUS_SCHEMA.names) | {"key": "k"} | known

    rows = [
        row("ok", "", 300),
        row("ok", "", 300, "L", "PNG in a file named .jpeg; was 9x9 L PNG"),
        row("ok", "", 63),
    ]
    rows += [row("failed", "truncated"), row("failed", "truncated"), row("skipped", "duplicate")]
    console = Console(width=120, file=io.StringIO())
    for table in report(pa.Table.from_pylist(rows, schema=STATUS_SCHEMA)):
        console.print(table)
    shown = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert shown == [
        *("status reason inputs MB", "ok 3 3.0", "skipped duplicate 1 1.0", "failed truncated 2 2.0"),
        *("short side pictures mode pictures", "< 64 1 RGB 2", "256 to 511 2 L 1"),
        *("odd, but used pictures", "PNG in a file named .jpeg 1"),
    ]
