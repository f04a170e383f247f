"""The stages of the bulk job as plain functions, with a model that repeats pixels."""

from __future__ import annotations

import hashlib
import json
import pickle
import zlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.upscale import Row, UpscaleOptions, fetch, plan_work, store, upscale, verify
from resshift import images, storage
from resshift.images import Picture
from resshift.storage import Entry

Encode = Callable[..., bytes]
OPTIONS = UpscaleOptions(model="nearest", identity="0123", scale=4)


class Nearest:
    """Stands in for the Upscaler: every pixel four times in each direction."""

    def upscale(self, picture: Picture, *, seed: int, outscale: float | None, tile_px: int | None) -> Picture:
        if picture.width == 13:
            raise RuntimeError("thirteen")
        return replace(picture, pixels=picture.pixels.repeat(4, axis=0).repeat(4, axis=1))


def entry(key: str, etag: str = "e", irregular: str | None = None) -> Entry:
    return Entry(key, f"/photos/{key}", 1, etag, datetime(2026, 1, 1, tzinfo=UTC), irregular)


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
    options = replace(OPTIONS, name="{stem}@{scale}.{ext}", format="jpeg", scale=2.5)
    assert options.output_key("x/a.png") == "a@2.5.jpg"
    with pytest.raises(ValueError, match=r"'when'.*allowed: \{dir\}"):
        replace(OPTIONS, name="{when}").output_key("a.png")


def test_work_is_the_listing_minus_the_ledger() -> None:
    entries = [entry("a.png"), entry("b.png", "new"), entry("c.png"), entry("c.jpg"), entry("pipe", irregular="FIFO")]
    work = plan_work(entries, {"a.png": "e", "b.png": "old"}, OPTIONS)
    assert [json.loads(row["record"])["key"] for row in work.pending] == ["b.png", "c.png"]
    assert work.num_done == 1
    refused = {row["key"]: (row["reason"], row["message"]) for row in work.refused}
    assert refused["c.jpg"][0] == "name_collision"
    assert "c.png is written to c_x4.png" in refused["c.jpg"][1]
    assert refused["pipe"] == ("irregular", "FIFO")


def test_an_input_that_is_done_still_owns_its_name() -> None:
    for done, late in (("c.jpg", "c.png"), ("c.png", "c.jpg")):  # whichever comes first in the listing
        work = plan_work([entry("c.jpg"), entry("c.png")], {done: "e"}, OPTIONS, {"c_x4.png": done})
        assert (work.num_done, len(work.pending), work.refused[0]["key"]) == (1, 0, late)


def test_an_input_that_cannot_be_read_owns_nothing() -> None:
    work = plan_work([entry("c.jpg", irregular="FIFO"), entry("c.png")], {}, OPTIONS)
    assert [json.loads(row["record"])["key"] for row in work.pending] == ["c.png"]


@pytest.mark.parametrize("name", ["../{stem}.{ext}", "/abs/{stem}.{ext}", "_resshift/{stem}.{ext}", "{dir}", "{stem.foo}"])
def test_names_stay_inside_the_destination(name: str) -> None:
    with pytest.raises(ValueError, match="the name"):
        replace(OPTIONS, name=name).output_key("a.png")


def through(path: Path, out: Path, options: UpscaleOptions = OPTIONS) -> Row:
    """Take one file through all stages and return its ledger row."""
    (row,) = plan_work([Entry(path.name, str(path), 1, "e", datetime(2026, 1, 1, tzinfo=UTC))], {}, options).pending
    model: Any = Nearest()
    return json.loads(store(upscale(fetch(row, options), model, options), str(out), options)["record"])


def test_good_picture_is_written_and_recorded(tmp_path: Path, encode: Encode) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(1, 5, 7))
    row = through(path, tmp_path / "out")
    data = (tmp_path / "out" / "a_x4.png").read_bytes()
    expected = images.decode(path.read_bytes()).pixels.repeat(4, axis=0).repeat(4, axis=1)
    np.testing.assert_array_equal(images.decode(data).pixels, expected)
    assert row["status"] == "ok"
    assert (row["width_in"], row["height_in"], row["width_out"], row["height_out"]) == (7, 5, 28, 20)
    assert row["sha256_in"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (row["sha256_out"], row["bytes_out"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert row["seconds"] > 0
    assert "uri" not in row


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "empty"), (b"<html>", "not_an_image"), ("cut", "truncated"), ("huge", "too_large"), (None, "missing")]
)
def test_bad_input_is_a_row_and_writes_nothing(data: bytes | str | None, reason: str, tmp_path: Path, encode: Encode) -> None:
    huge = bytearray(encode())
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    content = {"cut": encode()[:-200], "huge": bytes(huge)}.get(str(data), data)
    if isinstance(content, bytes):
        (tmp_path / "x.png").write_bytes(content)
    row = through(tmp_path / "x.png", tmp_path / "out")
    assert (row["status"], row["reason"]) == ("failed", reason)
    assert row["message"]
    assert not (tmp_path / "out").exists()


def test_a_model_that_fails_is_a_row_with_its_traceback(tmp_path: Path, encode: Encode) -> None:
    (tmp_path / "x.png").write_bytes(encode(0, 5, 13))
    row = through(tmp_path / "x.png", tmp_path / "out")
    assert (row["status"], row["reason"]) == ("failed", "upscale_error")
    assert "RuntimeError: thirteen" in row["message"]
    assert "in upscale" in row["message"]


def test_a_model_that_fails_leaves_its_neighbours_alone(tmp_path: Path, encode: Encode) -> None:
    widths = (7, 13, 7)
    for i, width in enumerate(widths):
        (tmp_path / f"{i}.png").write_bytes(encode(i, 5, width))
    assert [through(tmp_path / f"{i}.png", tmp_path / "out")["status"] for i in range(3)] == ["ok", "failed", "ok"]
    for i in (0, 2):
        expected = images.decode((tmp_path / f"{i}.png").read_bytes()).pixels.repeat(4, axis=0).repeat(4, axis=1)
        np.testing.assert_array_equal(images.decode((tmp_path / "out" / f"{i}_x4.png").read_bytes()).pixels, expected)


def test_failed_rows_never_reach_the_model(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    (row,) = plan_work([Entry("x.png", str(tmp_path / "x.png"), 0, "e", datetime(2026, 1, 1, tzinfo=UTC))], {}, OPTIONS).pending
    failed = fetch(row, OPTIONS)
    no_model: Any = None
    assert upscale(failed, no_model, OPTIONS) == failed
    assert failed["payload"] == b""


def test_destination_that_cannot_be_written_is_a_row(tmp_path: Path, encode: Encode) -> None:
    (tmp_path / "x.png").write_bytes(encode(0, 5, 5))
    (tmp_path / "out" / "x_x4.png").mkdir(parents=True)
    row = through(tmp_path / "x.png", tmp_path / "out")
    assert row["status"] == "failed"
    assert row["reason"] in {"irregular", "invalid", "denied", "unavailable"}


def test_result_that_would_not_fit_is_refused_before_the_work(tmp_path: Path, encode: Encode) -> None:
    (tmp_path / "x.png").write_bytes(encode(0, 64, 64))
    (row,) = plan_work([Entry("x.png", str(tmp_path / "x.png"), 1, "e", datetime(2026, 1, 1, tzinfo=UTC))], {}, OPTIONS).pending
    fetched = fetch(row, replace(OPTIONS, scale=1000))
    assert json.loads(fetched["record"])["reason"] == "too_large"
    assert "GB are allowed" in json.loads(fetched["record"])["message"]
    assert isinstance(pickle.loads(fetch(row, OPTIONS)["payload"]), Picture)


def test_verify_names_what_is_not_as_recorded(tmp_path: Path, encode: Encode) -> None:
    rows: list[Row] = []
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encode(i, 5, 5))
        rows.append(through(tmp_path / f"{i}.png", tmp_path / "out"))
    assert list(verify(rows, str(tmp_path / "out"))) == []
    storage.write_bytes(str(tmp_path / "out" / "1_x4.png"), b"changed")
    storage.write_bytes(str(tmp_path / "out" / "2_x4.png"), encode(9, 20, 20))
    (tmp_path / "out" / "3_x4.png").unlink()
    problems = list(verify(rows, str(tmp_path / "out")))
    assert [problem.split(":")[0].split("/")[-1] for problem in problems] == ["1_x4.png", "2_x4.png", "3_x4.png"]
    assert "sha256 differs" in problems[1]
