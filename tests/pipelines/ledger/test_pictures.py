"""The pictures of a report: which, and what of them."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.ledger import ledger, pictures
from pipelines.ledger.pictures import Places, Sample, cards
from pipelines.ledger.report import write_report
from pipelines.pages import Embedded


def rows(num: int) -> pa.Table:
    return pa.Table.from_pylist([ledger.row(f"{i:04d}", "e", "ok") for i in range(num)], schema=ledger.SCHEMA)


def test_a_sample_does_not_depend_on_how_the_rows_are_divided() -> None:
    table = rows(1000)
    whole, parts, few = Sample(12), Sample(12), Sample(12)
    whole.add(table)
    for start, stop in ((0, 5), (5, 5), (5, 400), (400, 1000)):
        parts.add(table.slice(start, stop - start))
    few.add(table.slice(0, 3))
    drawn = [row["key"] for row in whole.rows()]
    assert [row["key"] for row in parts.rows()] == drawn
    assert len(set(drawn)) == 12
    assert min(drawn) < "0400" < max(drawn)
    assert sorted(row["key"] for row in few.rows()) == ["0000", "0001", "0002"]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Four inputs, flat but for a square of 32 x 32 that the last of them has at (64, 32); outputs are four
    times as large, one is missing and one is no picture.
    """
    source, target = tmp_path / "in", tmp_path / "out"
    done: list[ledger.Row] = []
    for i, name in enumerate(("missing", "page", "photo #1", "textured")):
        pixels = np.full((128, 96, 3), 90, np.uint8)
        if name == "textured":
            pixels[64:128, 32:96] = (
                np.random.default_rng(i).integers(0, 256, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
            )
        for folder, picture, key in (
            (source, pixels, f"{name}.png"),
            (target, pixels.repeat(4, 0).repeat(4, 1), f"{name}_x4.png"),
        ):
            folder.mkdir(exist_ok=True)
            Image.fromarray(picture).save(folder / key)
        sizes = {"width_in": 96, "height_in": 128, "width_out": 384, "height_out": 512}
        done.append(ledger.row(f"{name}.png", "e", "ok", output=f"{name}_x4.png", **sizes))
    (source / "missing.png").unlink()
    (target / "page_x4.png").write_bytes(b"<html>")
    failed = ledger.row("broken <b>.png", "e", "failed", reason="truncated")
    ledger.append(str(target), [*done, failed])
    return Places(str(source), str(target))


def shown(picture: Embedded | None) -> np.ndarray:
    assert picture is not None
    data = base64.b64decode(picture.uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


@pytest.mark.slow  # with a decoder of its own, as the next
def test_the_report_shows_the_detail_that_varies_most_and_links_to_its_files(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[pictures.Card] = []

    def noted(*arguments: object) -> list[pictures.Card]:
        made.extend(cards(*arguments))  # pyright: ignore[reportArgumentType]
        return made

    monkeypatch.setattr("pipelines.ledger.report.cards", noted)
    write_report(places.target, {}, None, places=places)
    assert [card.key for card in made] == ["photo #1.png", "textured.png"]  # others cannot be read
    textured = made[1]
    before, after = shown(textured.before), shown(textured.after)
    assert before.shape == (64, 64, 3)
    assert after.shape == (256, 256, 3)
    assert before.std() > 40
    assert np.abs(after[2::4, 2::4] - before).mean() < 6  # JPEG twice
    assert (textured.before, textured.after) != (None, None)
    assert textured.before is not None
    assert (textured.before.width, textured.before.height) == (256, 256)  # a browser enlarges it
    assert textured.whole.size == "240 × 320"

    page = (Path(places.target) / "_resshift" / "report.html").read_text()
    assert 'href="../photo%20%231_x4.png"' in page
    assert f'href="{(Path(places.source) / "photo #1.png").as_uri()}"' in page
    assert f'href="{(Path(places.source) / "broken <b>.png").as_uri()}"' in page  # failed ones too
    assert "96 × 128 → 384 × 512" in page
    assert "<script" not in page


@pytest.mark.slow
def test_large_outputs_are_not_decoded(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_MOST_PIXELS", 384 * 512)  # one of them
    row = {"width_in": 96, "height_in": 128, "width_out": 384, "height_out": 512}
    wanted = [{**row, "key": f"{name}.png", "output": f"{name}_x4.png"} for name in ("textured", "photo #1")]
    second, first = cards(wanted, places)
    assert first.after is not None
    assert (second.before, second.after) == (None, None)
    assert second.whole.size == "96 × 128"  # the input


def test_a_bucket_has_no_address_for_browsers() -> None:
    assert Places("s3://bucket/in", "s3://bucket/out").link_to_input("a.png") is None


@pytest.mark.parametrize("source", ["folder", "s3://bucket/in"])
def test_keys_that_name_no_file_are_in_the_report_without_a_link(source: str, tmp_path: Path) -> None:
    keys = ["/x.dng", "//x.dng", "../x.png", "a/../b.png", "a//b.png", "./a.png", "..", "a\0b.png"]
    sizes = {"width_in": 1, "height_in": 1, "width_out": 4, "height_out": 4}
    made = ledger.row("/y.png", "e", "ok", output="(empty)/y_x4.png", **sizes)
    ledger.append(str(tmp_path), [made, *(ledger.row(key, "e", "failed", reason="invalid") for key in keys)])
    root = str(tmp_path / source) if source == "folder" else source
    summary = write_report(str(tmp_path), {}, None, places=Places(root, str(tmp_path)))
    assert (summary.counts["ok"], summary.counts["failed"]) == (1, len(keys))
    html = (tmp_path / "_resshift" / "report.html").read_text()
    assert "../x.png" in html
    assert "file:" not in html
