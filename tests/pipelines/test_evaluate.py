"""Evaluation: matching, figures and reports with known answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluate import averages, bicubic_resized, card, compare, pair_up, summary_table, to_csv

Encode = Callable[..., bytes]
RECORDS = [
    {"key": "a", "status": "ok", "seconds": 1.0, "bicubic": {"psnr_y": 20.0, "ssim_y": 0.5}, "ours": {"psnr_y": 22.0, "ssim_y": 0.75}},
    {"key": "b", "status": "ok", "seconds": 1.0, "bicubic": {"psnr_y": 30.0, "ssim_y": 0.5}, "ours": {"psnr_y": 26.0, "ssim_y": 0.25}},
    {"key": "c", "status": "failed", "reason": "truncated"},
]


def write(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return str(folder)


def test_pictures_are_matched_without_their_extension(tmp_path: Path) -> None:
    lq, gt = write(tmp_path / "lq", "a.jpg", "x/b.png"), write(tmp_path / "gt", "a.png", "x/b.png", "unused.png")
    assert [(pair.key, Path(pair.gt_uri or "").name) for pair in pair_up(lq, gt)] == [("a", "a.png"), ("x/b", "b.png")]
    assert [pair.gt_uri for pair in pair_up(lq, None)] == [None, None]


def test_what_cannot_be_matched_is_named(tmp_path: Path) -> None:
    lq = write(tmp_path / "lq", "a.jpg", "b.png")
    with pytest.raises(ValueError, match=r"1 pictures .*: b"):
        pair_up(lq, write(tmp_path / "gt", "a.png"))
    write(tmp_path / "lq", "a.png")
    with pytest.raises(ValueError, match="same name without extension"):
        pair_up(lq, None)


def test_equal_pictures_are_perfect() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    assert compare(picture, picture, 0, None) == {"psnr_y": float("inf"), "ssim_y": pytest.approx(1), "psnr_rgb": float("inf")}


def test_pictures_of_different_sizes_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"of one shape.*\(20, 20\).*\(20, 21\)"):
        compare(np.zeros((20, 20, 3), np.uint8), np.zeros((20, 21, 3), np.uint8), 0, None)


def test_bicubic_of_a_flat_picture_is_flat() -> None:
    for scale, size in ((4, (28, 20)), (0.25, (2, 2))):
        out = bicubic_resized(np.full((7, 5, 3), 200, np.uint8), scale)
        assert out.shape == (*size, 3)
        assert np.all(out == 200)


def test_averages_leave_failures_out() -> None:
    means = averages(RECORDS)
    assert means == {"bicubic": {"psnr_y": 25.0, "ssim_y": 0.5}, "ours": {"psnr_y": 24.0, "ssim_y": 0.5}}
    assert summary_table(means) == [["", "bicubic", "ours"], ["PSNR-Y", "25.00 dB", "24.00 dB"], ["SSIM-Y", "0.5000", "0.5000"]]


def test_csv_has_every_picture() -> None:
    lines = to_csv(RECORDS).splitlines()
    assert lines[0].split(",")[:8] == ["key", "status", "reason", "width", "height", "seconds", "psnr_y_bicubic", "psnr_y_ours"]
    assert lines[1].startswith("a,ok,,,,1.0,20.0,22.0,0.5,0.75")
    assert lines[3].startswith("c,failed,truncated")


def test_card_shows_both_figures(encode: Encode) -> None:
    pictures = {"lq": encode(0, 5, 5), "bicubic": encode(1, 20, 20), "ours": encode(2, 20, 20), "gt": b""}
    made = card(RECORDS[0], pictures)
    assert made.figures == {"PSNR-Y": ("20.00 dB", "22.00 dB"), "SSIM-Y": ("0.5000", "0.7500")}
    assert (made.gt, made.note) == (None, "1.0 s")
