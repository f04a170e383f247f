"""Tars are read by their headers: the same inputs as the extracted tree, and no damage goes unsaid."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from pipelines.shards import sources
from pipelines.shards.archives import members
from pipelines.shards.sources import Archive, Item, list_inputs
from resshift import storage


def tar_of(files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def opened(path: Path) -> list[Item]:
    """Return everything in a tar, tars in it included."""
    waiting: list[Item | Archive] = list(list_inputs(str(path)))
    items: list[Item] = []
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, Archive):
            waiting += members(one)
        else:
            items.append(one)
    return items


def contents(items: list[Item]) -> dict[str, bytes]:
    return {item.key: sources.read(item, 1 << 20) for item in items if item.outcome is None}


LONG = "directory/" * 30 + "n" * 120 + ".jpg"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_and_read_in_place(tmp_path: Path, format: int) -> None:
    files = {"a.jpg": b"a" * 1000, "b/c.png": b"", "./d.jpg": b"d" * 512, "é 写真.jpg": b"x" * 70_000}
    if format != tarfile.USTAR_FORMAT:
        files[LONG] = b"long"
    (tmp_path / "photos.tar").write_bytes(tar_of(files, format))
    found = opened(tmp_path / "photos.tar")
    assert contents(found) == {name.removeprefix("./"): data for name, data in files.items()}
    assert found[-1].outcome == ("skipped", "archive", f"{len(files)} members")


def test_a_tar_of_class_tars_has_the_keys_of_the_extracted_tree(tmp_path: Path) -> None:
    tree = {f"n{i}/n{i}_{j}.JPEG": bytes([i, j]) * 300 for i in range(3) for j in range(4)}
    classes = {
        f"n{i}.tar": tar_of(
            {key.split("/")[1]: data for key, data in tree.items() if key.startswith(f"n{i}/")}
        )
        for i in range(3)
    }
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of(classes))
    found = opened(tmp_path / "ILSVRC2012_img_train.tar")
    assert contents(found) == tree
    assert {item.key for item in found if item.outcome} == {
        "ILSVRC2012_img_train.tar",
        "n0.tar",
        "n1.tar",
        "n2.tar",
    }
    assert {sources.label_of(item) for item in found if item.outcome is None} == {"n0", "n1", "n2"}
    assert len({item.etag for item in found}) == len(found)


def test_a_tar_in_a_folder_or_a_bucket_adds_its_name(tmp_path: Path, bucket: str) -> None:
    data = tar_of({"x.jpg": b"x", "sub/y.jpg": b"yy"})
    for root in (str(tmp_path / "in"), f"{bucket}/in"):
        storage.write_bytes(f"{root}/day/one.tar", data)
        storage.write_bytes(f"{root}/z.jpg", b"zzz")
        found = [
            item
            for one in list_inputs(root)
            for item in (members(one) if isinstance(one, Archive) else [one])
        ]
        assert contents([item for item in found if isinstance(item, Item)]) == {
            "day/one/x.jpg": b"x",
            "day/one/sub/y.jpg": b"yy",
            "z.jpg": b"zzz",
        }


def test_files_beside_a_picture_give_its_label_and_all_others_are_inputs(tmp_path: Path) -> None:
    files = {
        **{"0001.jpg": b"p", "0001.cls": b"37\n", "0001.json": b'{"label": "no"}', "0001.txt": b"a caption"},
        **{"0002.json": b'{"cls": 5}', "0002.seg.png": b"m", "0002.jpg": b"q"},
        **{
            "0003.jpg": b"r",
            "0003.json": b"[not json",
            "lonely.txt": b"t",
            "0004.jpg": b"s",
            "0004.npy": b"n",
        },
    }
    (tmp_path / "shard-000.tar").write_bytes(tar_of(files))
    found = [item for item in opened(tmp_path / "shard-000.tar") if item.outcome is None]
    labels = {item.key: sources.label_of(item) for item in found}
    assert labels == {
        **{"0001.jpg": "37", "0002.jpg": "5", "0002.seg.png": "5", "0003.jpg": ""},
        **{"lonely.txt": "", "0004.jpg": "", "0004.npy": ""},
    }


def test_damage_is_named_and_what_stands_before_it_is_kept(tmp_path: Path) -> None:
    whole = tar_of(
        {f"{i}.jpg": bytes([i]) * 700 for i in range(5)}
    )  # a header and two blocks each, then the end mark
    third = 2 * 1536

    def outcome(data: bytes) -> tuple[int, tuple[str, str, str] | None]:
        (tmp_path / "x.tar").write_bytes(data)
        *found, last = opened(tmp_path / "x.tar")
        assert last.key == "x.tar"
        return sum(item.outcome is None for item in found), last.outcome

    assert outcome(whole) == (5, ("skipped", "archive", "5 members"))
    for data, num_good in (
        (whole[:third], 2),
        (whole[: third + 100], 2),
        (whole[: third + 900], 2),
        (whole[:third] + b"\xff" * 512 + whole[third + 512 :], 2),
        (b"not a tar at all" * 100, 0),
        (b"", 0),
    ):
        found, what = outcome(data)
        assert found == num_good
        assert what is not None
        assert what[:2] == ("failed", "damaged_archive")


def test_links_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("passwd.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (item, _) = opened(tmp_path / "x.tar")
    assert item.outcome is not None
    assert item.outcome[:2] == ("failed", "irregular")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_list_names_files_and_folders_with_labels(encoding: str, tmp_path: Path) -> None:
    for name in ("a.jpg", "sub/b.jpg", "sub/deep/c.jpg", "with space.jpg"):
        storage.write_bytes(str(tmp_path / name), name.encode())
    lines = ["# photos", "", f"{tmp_path}/a.jpg\tcat", "sub", "with space.jpg", "missing.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n", encoding=encoding)
    found = [one for one in list_inputs(str(tmp_path / "list.txt")) if isinstance(one, Item)]
    absolute = f"{tmp_path}/a.jpg".lstrip("/")
    assert {item.key: sources.label_of(item) for item in found} == {
        **{
            absolute: "cat",
            "sub/b.jpg": "sub",
            "sub/deep/c.jpg": "deep",
            "with space.jpg": "",
            "missing.jpg": "",
        }
    }
    assert contents(found) == {
        absolute: b"a.jpg",
        **{name: name.encode() for name in ("sub/b.jpg", "sub/deep/c.jpg", "with space.jpg")},
    }
    assert [item.outcome[1] for item in found if item.outcome] == ["missing"]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.TGZ", "x.zip"])
def test_compressed_archives_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is compressed"):
        list(list_inputs(name))
