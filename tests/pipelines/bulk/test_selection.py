"""Which inputs need work: globs, the ledger, taken names; and the compact sets behind it, against Python's
own.
"""

from __future__ import annotations

import itertools
import re
import struct
import tracemalloc
from collections import Counter
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from pipelines.bulk.request import BulkRequest
from pipelines.bulk.selection import Selection, WorkItem, Worklist, listed_keys
from pipelines.bulk.stages import StageOptions, UpscaleOptions
from pipelines.bulk.sweep import Inputs
from pipelines.ledger.digests import DigestSet, OwnerMap, digests
from pipelines.ledger.ledger import Known, Row, failed
from resshift import output_names, storage
from resshift.storage import Entry
from tests.pictures import encoded, noise, tiff_of

OPTIONS = UpscaleOptions(model="nearest-x4", identity="0123", scale=4)


def entry(key: str, etag: str = "e", size: int = 1, irregular: str | None = None) -> Entry:
    return Entry(key, f"/photos/{key}", size, etag, datetime(2026, 1, 1, tzinfo=UTC), irregular)


def known(done: dict[str, str] | None = None, outputs: dict[str, str] | None = None) -> Known:
    """Return what a ledger says: etags of done keys, and which key wrote an output."""
    owners = OwnerMap()
    if outputs:
        owners.claim(digests(list(outputs)), digests(list(outputs.values())))
    return Known(DigestSet(digests(list((done or {}).items()))), owners, Counter())


def divided(
    entries: list[Entry], what: Known | None = None, failing: Collection[str] = ()
) -> tuple[list[str], dict[str, tuple[str, str]], Worklist]:
    """Return the keys to do in their order, (reason, message) of the rest, and the worklist. Files are looked
    into where they exist; the outputs of `failing` cannot be made.
    """
    worklist = Worklist(entries, what or known(), OPTIONS.output_key, OPTIONS.scale, first_bytes)
    items, rows = work_of(worklist, failing)
    return (
        [item.key for item in items],
        {row["key"]: (row["reason"], row["message"]) for row in rows},
        worklist,
    )


def work_of(worklist: Worklist, failing: Collection[str] = ()) -> tuple[list[WorkItem], list[Row]]:
    done: list[WorkItem] = []
    rows: list[Row] = []
    batches = list(worklist.batches())
    while batches:
        items, refused = batches.pop(0)
        done += items
        rows += refused
        for item in items:
            row = item.row("nearest-x4")
            batches.append(worklist.settle(failed(row, "corrupt", "") if item.key in failing else row))
    return done, rows


def first_bytes(uri: str) -> bytes:
    return storage.read_first_bytes(uri, 1 << 16)


def folder_of(root: Path, files: Mapping[str, bytes]) -> list[Entry]:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return list(storage.list_entries(str(root)))


@pytest.mark.parametrize(
    ("key", "output"),
    [
        ("a.png", "a_x4.png"),
        ("day 1/b.c.jpeg", "day 1/b.c_x4.png"),
        ("deep/er/noext", "deep/er/noext_x4.png"),
        (".hidden", ".hidden_x4.png"),
    ],
)
def test_outputs_keep_the_tree(key: str, output: str) -> None:
    assert OPTIONS.output_key(key) == output


def test_names_follow_the_template() -> None:
    assert output_names.output_key("x/a.png", "{stem}@{scale}.{ext}", "jpeg", 2.5) == "a@2.5.jpg"
    with pytest.raises(ValueError, match=r"\{when\}.*allowed: \{dir\}"):
        output_names.output_key("a.png", "{when}", "png", 4)


@pytest.mark.parametrize(
    "name", ["{stem:>2000000000}.{ext}", "{dir.__class__}", "{dir[0]}", "{name!r}", "{}", "{0}", "{stem", "}"]
)
def test_braces_hold_names_of_fields_and_nothing_more(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            output_names.output_key("a.png", name, "png", 4)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # the first made a name of 2 GB
    finally:
        tracemalloc.stop()


def test_parts_that_no_directory_can_be_called_have_names_of_their_own() -> None:
    parts = ["", ".", "..", "(empty)", "(dot)", "(dot-dot)", "((empty))", "((dot)", "(dot))", "empty"]
    keys = ["/".join(two) for two in itertools.product(parts, repeat=2)]
    for template in ("{dir}/{name}", "{dir}/{stem}_x{scale}.{ext}", "{dir}/{name}.{ext}"):
        outputs = [output_names.output_key(key, template, "png", 4) for key in keys]
        assert len(set(outputs)) == len(keys)


@pytest.mark.parametrize("name", ["../{stem}.{ext}", "/abs/{stem}.{ext}", "_resshift/{stem}.{ext}", "{dir}"])
def test_names_stay_inside_the_destination(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        output_names.output_key("a.png", name, "png", 4)


@pytest.mark.parametrize(
    ("key", "format", "output"),
    [
        ("a.JPG", "jpeg", "a_x4.JPG"),
        ("a.webp", "webp", "a_x4.webp"),
        ("a.gif", "png", "a_x4.png"),
        ("noext", "png", "noext_x4.png"),
    ],
)
def test_kept_formats_follow_the_extension(key: str, format: str, output: str) -> None:
    assert output_names.output_format(key, "keep")[0] == format
    assert output_names.output_key(key, "{dir}/{stem}_x{scale}.{ext}", "keep", 4) == output


def test_a_key_of_other_bytes_and_the_text_of_its_escape_are_two_inputs() -> None:
    listing = [entry("\udcff.png"), entry("\\udcff.png")]
    work, refused = work_of(Worklist(listing, known(), OPTIONS.output_key, OPTIONS.scale))
    assert (len({item.key for item in work}), len({item.output for item in work}), refused) == (2, 2, [])
    assert work[0].key == r"\udcff.png"


def test_work_is_the_listing_minus_the_ledger() -> None:
    entries = [
        entry("a.png"),
        entry("b.png", "new"),
        entry("c.png"),
        entry("c.jpg"),
        entry("pipe", irregular="FIFO"),
    ]
    pending, refused, worklist = divided(entries, known({"a.png": "e", "b.png": "old"}))
    assert pending == ["b.png", "c.png"]
    assert (worklist.counts.listed, worklist.counts.done, worklist.counts.refused) == (5, 1, 2)
    assert refused["c.jpg"][0] == "name_collision"
    assert "c.png is written to c_x4.png" in refused["c.jpg"][1]
    assert worklist.contested() == []
    assert refused["pipe"] == ("irregular", "FIFO")


def test_an_input_that_is_done_still_owns_its_name() -> None:
    for done, late in (("c.jpg", "c.png"), ("c.png", "c.jpg")):  # whichever comes first in the listing
        pending, refused, worklist = divided(
            [entry("c.jpg"), entry("c.png")], known({done: "e"}, {"c_x4.png": done})
        )
        assert (worklist.counts.done, pending, list(refused)) == (1, [], [late])


def test_an_input_that_cannot_be_read_owns_nothing() -> None:
    assert divided([entry("c.jpg", irregular="FIFO"), entry("c.png")])[0] == ["c.png"]


def test_a_thousand_names_collide_once_each_across_batches() -> None:
    entries = [entry(f"{i}.{extension}") for extension in ("jpg", "png") for i in range(1000)]
    pending, refused, _ = divided(entries)
    assert pending == [f"{i}.jpg" for i in range(1000)]
    assert list(refused) == [f"{i}.png" for i in range(1000)]


AAE, BOX = b'<?xml version="1.0"?><plist/>', b"\0\0\0\x14ftypqt  \0\0\0\0qt  "
RAW = tiff_of([(noise(0, 8, 12), {254: 1, 330: 0, 50706: 1})])


def test_a_file_that_is_no_picture_owns_no_name(tmp_path: Path) -> None:
    files = {
        **{"DCIM/IMG_1.AAE": AAE, "DCIM/IMG_1.HEIC": b"photo", "DCIM/IMG_1.MOV": BOX},
        **{"set/cap.json": b"{}", "set/cap.png": b"photo", "set/cap.txt": b"a cat", "set/cap.cls": b"5"},
        **{"mac/._p.jpg": b"\0\5\x16\7" + bytes(80), "mac/.DS_Store": b"\0\0\0\1Bud1", "mac/p.jpg": b"photo"},
        **{
            "android/.nomedia": b"",
            "android/v.3gp": BOX.replace(b"qt  ", b"3gp4"),
            "android/v.jpg": b"photo",
        },
        **{
            "notes/BMW service.txt": b"BMW service book",
            "notes/P5.md": b"P5 is a page",
            "notes/x.pdf": b"%PDF",
        },
    }
    worklist = Worklist(folder_of(tmp_path, files), known(), OPTIONS.output_key, 4, first_bytes)
    items, rows = work_of(worklist)
    assert {item.key for item in items} == {key for key, data in files.items() if data == b"photo"}
    assert {row["key"] for row in rows} == {key for key, data in files.items() if data != b"photo"}
    assert {(row["status"], row["reason"], row["output"]) for row in rows} == {
        ("skipped", "not_an_image", "")
    }


def test_a_picture_is_one_whatever_its_name(tmp_path: Path) -> None:
    files = {
        "noext": encoded(0),
        "upload.dat": encoded(1, format="JPEG"),
        "photo.2019": encoded(2, format="GIF"),
    }
    assert sorted(divided(folder_of(tmp_path, files))[0]) == sorted(files)


def test_a_name_is_given_back_by_an_input_that_cannot_be_made() -> None:
    entries = [entry(f"a.{extension}") for extension in ("gif", "heic", "jpg", "png", "webp")]
    pending, refused, worklist = divided(entries, failing=("a.gif", "a.heic"))
    assert pending == ["a.gif", "a.heic", "a.jpg"]
    assert list(refused) == ["a.png", "a.webp"]
    assert refused["a.png"][1].startswith("a.jpg is written to a_x4.png already")
    assert (worklist.counts.listed, worklist.counts.pending, worklist.counts.refused) == (5, 3, 2)


def test_a_name_that_was_given_back_is_free_for_later_inputs() -> None:
    late = iter([entry("a.jpg"), *(entry(f"{i}.png") for i in range(300)), entry("a.png")])
    worklist = Worklist(late, known(), OPTIONS.output_key, 4)
    batches = worklist.batches()
    (first, *_), _ = next(batches)
    worklist.settle(failed(first.row("nearest-x4"), "corrupt", ""))
    assert next(batches)[0][-1].key == "a.png"


def test_owner_maps_give_names_back() -> None:
    owners = OwnerMap()
    names, keys = digests(["x", "y", "x"]), digests(["a", "b", "c"])
    assert owners.claim(names, keys).tolist() == [True, True, False]
    owners.release(names[:1])
    assert owners.claim(digests(["x", "x", "y"]), digests(["c", "a", "c"])).tolist() == [True, False, False]


def test_camera_raw_beside_its_picture_is_skipped_and_alone_it_failed(tmp_path: Path) -> None:
    files = {
        "a.DNG": RAW,
        "a.JPG": b"photo",
        "b.heic": b"photo",
        "b.nef": RAW,
        "c.dng": RAW,
        "d.tif": b"photo",
    }
    listing = folder_of(tmp_path, files)
    worklist = Worklist(listing, known(), OPTIONS.output_key, 4, first_bytes)
    items, rows = work_of(worklist)
    assert [item.key for item in items] == ["a.JPG", "b.heic", "d.tif"]
    told = {row["key"]: (row["status"], row["reason"]) for row in rows}
    assert told == {
        "a.DNG": ("skipped", "unsupported_format"),
        "b.nef": ("skipped", "unsupported_format"),
        "c.dng": ("failed", "unsupported_format"),
    }
    assert "the file is camera raw" in rows[-1]["message"]
    # The picture may be the first of the next 256 entries, or there may be none.
    many = [entry(f"0/{i:03d}.png") for i in range(255)]
    for rest, expected in ((listing[:2], ["skipped"]), (listing[4:5], ["failed"])):
        worklist = Worklist([*many, *rest], known(), OPTIONS.output_key, 4, first_bytes)
        assert [row["status"] for row in work_of(worklist)[1]] == expected


@pytest.mark.parametrize("at", [16, (64 << 10) - 20, 80_000, 3 << 20])
def test_camera_raw_is_known_wherever_its_directory_is(at: int, tmp_path: Path) -> None:
    (first,) = struct.unpack_from("<I", RAW, 4)
    far = RAW[:4] + struct.pack("<I", at) + bytes(at - 8) + RAW[first:]
    listing = folder_of(tmp_path, {"a.DNG": far, "a.JPG": b"photo", "b.dng": far, "c.tif_old": encoded(0)})
    stages = StageOptions(outputs=OPTIONS, target=str(tmp_path / "out"))
    items, rows = work_of(Inputs(source=str(tmp_path)).worklist(stages, listing))
    assert sorted(item.key for item in items) == ["a.JPG", "c.tif_old"]
    assert {row["key"]: row["status"] for row in rows} == {"a.DNG": "skipped", "b.dng": "failed"}
    assert rows[0]["message"].endswith("; a.JPG beside it")  # it may fail


def test_a_file_that_is_not_named_as_a_picture_yields_its_name_to_one_that_is(tmp_path: Path) -> None:
    names = ["D.THM", "D.jpg", "E", "E.png", "._F.jpg", "F.jpg", "alone.THM", "two.LRV", "two.THM"]
    listing = folder_of(tmp_path, dict.fromkeys(names, encoded(0, format="JPEG")))
    many = [entry(f"0/{i:03d}.png") for i in range(256)]
    wanted = {"D.jpg", "E.png", "F.jpg", "._F.jpg", "alone.THM", "two.LRV"}
    for first in range(len(names) + 1):  # so many are in the batch of those before them
        pending, refused, worklist = divided([*many[first:], *listing])
        assert {key for key in pending if not key.startswith("0/")} == wanted
        assert {key: reason for key, (reason, _) in refused.items()} == dict.fromkeys(
            ("D.THM", "E", "two.THM"), "name_collision"
        )
        assert refused["D.THM"][1].startswith("D.jpg is written to D_x4.png already")
        counts = worklist.counts
        assert (counts.listed, counts.pending, counts.refused) == (len(names) + 256 - first, 262 - first, 3)
    assert set(divided(listing, failing=("D.jpg",))[0]) == wanted | {"D.THM"}  # its turn


def test_globs_and_sizes_select() -> None:
    keys = ["a.jpg", "b.png", "deep/er/c.jpg", "private/d.jpg", "_resshift/e.jpg"]
    entries = [entry(key, size=i) for i, key in enumerate(keys)]

    def chosen(selection: Selection) -> list[str]:
        return [one.key for one in entries if selection.matcher()(one)]

    assert chosen(Selection()) == keys[:4]  # the records of a job are no pictures
    assert chosen(Selection(include=("*.jpg",))) == ["a.jpg", "deep/er/c.jpg", "private/d.jpg"]
    assert chosen(Selection(include=("*.jpg",), exclude=("private/*",))) == ["a.jpg", "deep/er/c.jpg"]
    assert chosen(Selection(include=("deep/*",))) == ["deep/er/c.jpg"]
    assert chosen(Selection(include=("[ab].*",))) == ["a.jpg", "b.png"]
    assert chosen(Selection(min_bytes=1, max_bytes=2)) == ["b.png", "deep/er/c.jpg"]


def test_a_list_of_keys_is_looked_up_once_each(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.png").write_bytes(b"123")
    found = list(listed_keys(str(tmp_path), ["b/x.png\n", "\n", "gone.png\n", "b/x.png\n", "../secret\n"]))
    assert [(one.key, one.size_bytes) for one in found] == [("b/x.png", 3), ("gone.png", 0), ("../secret", 0)]
    assert [(one.irregular or "").split(":")[0] for one in found] == ["", "missing", "invalid"]
    assert divided(found)[1]["gone.png"][0] == "missing"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["\ufeffa.png\r\nb.png\r\n", "\ufeffa.png\n\nb.png"])
def test_a_list_of_keys_may_come_from_any_editor(text: str, encoding: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"photo")
    (tmp_path / "keys.txt").write_text(text, encoding=encoding, newline="")
    listed = BulkRequest(source=str(tmp_path), target="/out", keys=str(tmp_path / "keys.txt")).entries()
    assert [(one.key, one.irregular) for one in listed] == [("a.png", None), ("b.png", None)]


def test_digest_sets_equal_python_sets() -> None:
    rng = np.random.default_rng(0)
    compact, plain = DigestSet(), set[str]()
    for _ in range(40):
        new = {f"key-{i}" for i in rng.integers(0, 5000, 60)} - plain
        compact.add(digests(sorted(new)))
        plain |= new
        wanted = [f"key-{i}" for i in rng.integers(0, 5000, 200)]
        assert compact.contains(digests(wanted)).tolist() == [key in plain for key in wanted]
    assert len(compact) == len(plain)
    assert compact.num_bytes == 16 * len(plain)


def test_owner_maps_equal_python_dicts() -> None:
    rng = np.random.default_rng(1)
    compact, plain = OwnerMap(), dict[str, str]()
    for _ in range(40):
        wanted = [
            (f"out-{i}", f"key-{i}-{j}")
            for i, j in zip(rng.integers(0, 800, 60), rng.integers(0, 2, 60), strict=True)
        ]
        granted = compact.claim(digests([name for name, _ in wanted]), digests([key for _, key in wanted]))
        assert granted.tolist() == [plain.setdefault(name, key) == key for name, key in wanted]
    assert compact.num_bytes == 12 * len(plain)


def test_keys_that_are_no_paths_have_outputs_of_their_own() -> None:
    """Keys of a bucket are any text; those of outputs are paths inside the target."""
    outputs = {
        "a/b.png": "a/b_x4.png",
        "a//b.png": "a/(empty)/b_x4.png",
        "/lead.png": "(empty)/lead_x4.png",
        "//lead.png": "(empty)/(empty)/lead_x4.png",
        "./b.png": "(dot)/b_x4.png",
        "a/../b.png": "a/(dot-dot)/b_x4.png",
        "../up.png": "(dot-dot)/up_x4.png",
    }
    assert {key: OPTIONS.output_key(key) for key in outputs} == outputs
    pending, refused, _ = divided([entry(key) for key in outputs])
    assert (pending, refused) == (list(outputs), {})


def test_a_key_that_leads_into_the_records_of_the_job_is_a_row() -> None:
    pending, refused, _ = divided([entry("_resshift/a.png"), entry("a.png")])
    assert (pending, refused["_resshift/a.png"][0]) == (["a.png"], "invalid")


def test_reading_ahead_loses_nothing() -> None:
    entries = [entry(f"{i:04d}.png") for i in range(1000)]
    done = {f"{i:04d}.png": "e" for i in range(1000) if i not in (700, 900)}
    worklist = Worklist(
        [*entries, entry("pipe", irregular="FIFO")], known(done), OPTIONS.output_key, OPTIONS.scale
    )
    assert worklist.has_work()
    batches = list(worklist.batches())
    assert [item.key for items, _ in batches for item in items] == ["0700.png", "0900.png"]
    assert [row["key"] for _, refused in batches for row in refused] == ["pipe"]
    assert (worklist.counts.listed, worklist.counts.done) == (1001, 998)


def test_nothing_to_do_is_known_at_the_end_of_the_listing() -> None:
    worklist = Worklist(
        [entry("a.png"), entry("pipe", irregular="FIFO")],
        known({"a.png": "e"}),
        OPTIONS.output_key,
        OPTIONS.scale,
    )
    assert not worklist.has_work()
    assert [[row["key"] for row in refused] for _, refused in worklist.batches()] == [["pipe"]]
