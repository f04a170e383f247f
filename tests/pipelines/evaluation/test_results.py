"""Figures, intervals, paired differences and reports with known answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from pipelines.evaluation import results
from pipelines.evaluation.figures import FIGURES, Judge, against_truth
from pipelines.evaluation.protocols import PROTOCOLS, Anchor, Protocol, reproduced
from pipelines.evaluation.results import Interval, Record, bootstrap
from tests.pictures import encoded

NAMES = {"bicubic": "bicubic", "ours": "mine", "against": "theirs"}


def record(key: str, psnr_y: float, bicubic: float = 20.0, **others: Any) -> Record:
    known: Record = {
        "set": "s",
        "key": key,
        "status": "ok",
        "reason": "",
        "message": "",
        "seconds": 1.0,
        "device": "cpu",
        "bicubic": {"psnr_y": bicubic, "ssim_y": 0.5},
        "ours": {"psnr_y": psnr_y, "ssim_y": 0.75},
    }
    return cast(Record, {**known, **others})


FAILED: Record = {"set": "s", "key": "z", "status": "failed", "reason": "truncated", "message": "cut"}
RECORDS = [record("b", 26.0, 30.0), record("a", 22.0), FAILED]


def test_equal_pictures_are_perfect() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    one = pytest.approx(1)
    assert against_truth(picture, picture) == {
        "psnr_y": np.inf,
        "ssim_y": one,
        "psnr_rgb": np.inf,
        "ssim_rgb": one,
    }


def test_pictures_of_different_sizes_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"of one shape.*\(20, 20\).*\(20, 21\)"):
        against_truth(np.zeros((20, 20, 3), np.uint8), np.zeros((20, 21, 3), np.uint8))


def test_without_a_truth_only_figures_of_the_picture_itself_are_measured(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", mu_pris_param=np.zeros(36), cov_pris_param=np.eye(36))
    judge = Judge(niqe_parameters=str(tmp_path / "p.npz"))
    picture = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    assert set(judge(picture, None)) == {"niqe"}
    assert set(judge(picture, picture)) == {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "niqe"}
    assert judge(picture[:90], None) == {}


def test_pyiqa_is_used_when_the_user_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []

    def create_metric(name: str, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        made.append((name, device))
        return lambda x: x.mean()  # pyiqa takes (1, 3, H, W) in [0, 1]

    module = ModuleType("pyiqa")
    monkeypatch.setattr(module, "create_metric", create_metric, raising=False)
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    judge = Judge(user_installed=("musiq",))
    assert judge(np.full((8, 8, 3), 51, np.uint8), None) == {"musiq": pytest.approx(0.2)}
    assert made == [("musiq", "cpu")]


def test_without_pyiqa_its_licence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(
        ImportError, match="clipiqa needs the package pyiqa, whose licence forbids commercial use"
    ):
        Judge(user_installed=("clipiqa",))


def test_st_lpips_is_that_of_the_users_package(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    class Distance(torch.nn.Module):
        def __init__(self, **options: object) -> None:
            super().__init__()
            asked.append(options)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x - y).abs().mean().reshape(1, 1, 1, 1)

    package = ModuleType("stlpips_pytorch")
    package.stlpips = SimpleNamespace(LPIPS=Distance)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", package)
    judge = Judge(user_installed=("st_lpips",))
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert judge(black, white)["st_lpips"] == 2
    assert "st_lpips" not in judge(black, None)
    assert asked == [{"net": "alex", "variant": "shift_tolerant", "verbose": False}]
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
    with pytest.raises(ImportError, match="pip install stlpips-pytorch torchsummary ipython"):
        Judge(user_installed=("st_lpips",))


def test_interval_is_that_of_the_normal_distribution() -> None:
    """For many values the bootstrap of a mean tends to mean +- 1.96 s / sqrt(n)."""
    values = np.random.default_rng(3).normal(5, 2, 1000)
    found = bootstrap(list(values))
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)
    assert found == bootstrap(list(values))


def test_intervals_of_few_or_endless_values_are_unknown() -> None:
    assert bootstrap([3.0]) == Interval(3.0, None, None)
    assert bootstrap([1.0, np.inf]) == Interval(np.inf, None, None)
    assert bootstrap([2.0, 2.0]) == Interval(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap([])


def test_means_leave_failures_out() -> None:
    means = results.means(RECORDS)
    assert {
        method: {name: value.mean for name, value in figures.items()} for method, figures in means.items()
    } == {
        "bicubic": {"psnr_y": 25.0, "ssim_y": 0.5},
        "ours": {"psnr_y": 24.0, "ssim_y": 0.75},
    }


def test_differences_are_paired() -> None:
    """Pictures of very different difficulty, each 1 dB better: the difference is certain although the means
    are not.
    """
    rows = [record(str(i), 11.0 + 5 * i, 10.0 + 5 * i) for i in range(5)]
    difference = bootstrap(results.differences(rows)["psnr_y"])
    assert difference == Interval(1.0, 1.0, 1.0)
    ours = results.means(rows)["ours"]["psnr_y"]
    assert (ours.high or 0) - (ours.low or 0) > 5


def test_the_other_model_takes_the_place_of_bicubic() -> None:
    rows = [record("a", 22.0, against={"psnr_y": 25.0}), record("b", 22.0, against={"psnr_y": np.inf})]
    assert results.reference_of(rows) == "against"
    assert results.differences(rows) == {"psnr_y": [-3.0]}
    assert results.table(rows, NAMES)[0] == ["", "bicubic", "theirs", "mine", "mine - theirs, 95 %"]


def test_table_says_how_sure_it_is() -> None:
    rows = [record(str(i), 21.0) for i in range(3)]
    assert results.table(rows, NAMES) == [
        ["", "bicubic", "mine", "mine - bicubic, 95 %"],
        ["PSNR-Y", "20.00 dB", "21.00 dB", "+1.00 dB [+1.00, +1.00]"],
        ["SSIM-Y", "0.5000", "0.7500", "+0.2500 [+0.2500, +0.2500]"],
    ]
    two_sets = results.table([*rows, record("x", 21.0, set="t")], NAMES)
    assert [row[0] for row in two_sets[1:]] == ["s: PSNR-Y", "s: SSIM-Y", "t: PSNR-Y", "t: SSIM-Y"]


def test_published_figures_stand_beside_ours() -> None:
    anchor = Anchor(method="Paper", source="table 1", figures={"psnr_y": 21.1, "lpips": 0.2}, preset="mine")
    protocol = Protocol(name="p", pictures=2, anchors=(anchor,))
    rows = [record("a", 21.0), record("b", 21.0)]
    table = results.table(rows, NAMES, protocol)
    assert [row[-1] for row in table] == ["Paper (published)", "21.10 dB", ""]
    found = reproduced(protocol, "mine", {"psnr_y": 21.0, "ssim_y": 0.1})
    assert {name: result.agrees for name, result in found.items()} == {"psnr_y": True}
    assert not reproduced(protocol, "mine", {"psnr_y": 21.3})["psnr_y"].agrees
    assert reproduced(protocol, "another", {"psnr_y": 21.0}) == {}
    assert protocol.measured_with("squeeze").anchors[0].figures == {"psnr_y": 21.1}
    assert protocol.measured_with("alex") is protocol


def test_protocols_name_figures_that_exist() -> None:
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert all(set(anchor.figures) <= set(FIGURES) for anchor in protocol.anchors)


def test_summary_is_the_same_in_any_order() -> None:
    facts = {"model": {"name": "mine"}}
    first = results.summary(RECORDS, facts, None, "mine")
    assert json.dumps(first) == json.dumps(results.summary(RECORDS[::-1], facts, None, "mine"))
    assert first["sets"]["s"]["pictures"] == 3
    assert first["sets"]["s"]["failed"] == 1
    assert "seconds" not in json.dumps(first)


def test_the_worst_pictures_come_first() -> None:
    rows = [record(f"{i:02d}", 30.0 - i) for i in range(40)]
    page = results.on_the_page([*rows, FAILED])
    assert len(page) == results.MOST_PICTURES_ON_THE_PAGE
    assert [row["key"] for row, _ in page[:3]] == ["39", "38", "37"]
    assert page[0][1] == "number 1 of the worst"
    assert [row["key"] for row, _ in page[10:12]] == ["00", "01"]
    by_lpips = [record(key, 30.0, ours={"lpips": value}) for key, value in (("a", 0.1), ("b", 0.3))]
    assert [row["key"] for row in results.worst(by_lpips)] == ["b", "a"]


def test_who_is_not_on_the_page_of_some_pictures_is_not_on_that_of_more() -> None:
    """`Gallery` relies on it when it drops pictures before all are known."""
    order = np.random.default_rng(5).permutation(200)
    rows = [record(f"{i:03d}", float((37 * i) % 101)) for i in order]
    held: set[str] = set()
    for count in range(1, len(rows) + 1):
        held.add(rows[count - 1]["key"])
        if count % 9 == 0:
            held &= {row["key"] for row, _ in results.on_the_page(rows[:count])}
    assert {row["key"] for row, _ in results.on_the_page(rows)} <= held


def test_a_gallery_keeps_the_pictures_of_the_page_and_no_others() -> None:
    png = encoded(0, 4, 4)
    gallery = results.Gallery()
    for i in range(200):
        pictures = {"lq": png, "bicubic": png, "ours": png, "gt": b""}
        gallery.add(record(f"{i * 37 % 200:03d}", 20.0 + i * 37 % 200 / 10), pictures)
        assert len(gallery._pictures) <= 2 * results.MOST_PICTURES_ON_THE_PAGE  # pyright: ignore[reportPrivateUsage]
    names = [card.name for card in gallery.cards(NAMES)]
    assert names == [f"s/{i:03d}" for i in range(32)]  # the ten worst, and the next in order of name


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    facts = {"model": {"name": "mine", "identity": "x", "scale": 4, "steps": 1}, "against": None}
    facts |= {"names": NAMES, "settings": {"lpips_net": None, "border": 0}, "versions": results.versions()}
    written = results.write(str(tmp_path), facts, RECORDS, None, [])
    assert [name for name, _ in written.failed] == ["s/z"]
    assert written.lines()[-1] == "failed s/z: truncated: cut"
    assert results.read(str(tmp_path)) == (facts, [RECORDS[1], RECORDS[0], FAILED])
    assert "mine on s" in (tmp_path / "report.html").read_text()


def test_csv_has_every_picture() -> None:
    lines = results.to_csv(RECORDS).splitlines()
    assert lines[0].split(",")[:9] == [
        "set",
        "key",
        "status",
        "reason",
        "width",
        "height",
        "seconds",
        "psnr_y_bicubic",
        "psnr_y_against",
    ]
    assert lines[2].startswith("s,a,ok,,,,1.0,20.0,,22.0,0.5,,0.75")
    assert lines[3].startswith("s,z,failed,truncated")


def test_reports_of_parts_are_the_report_of_the_whole() -> None:
    facts = {"model": "m", "settings": {"seed": 0}}
    whole = results.summary(RECORDS, facts, None, "m")
    found, records = results.merged([("one", facts, RECORDS[:1]), ("two", facts, RECORDS[1:])])
    assert json.dumps(results.summary(records, found, None, "m")) == json.dumps(whole)


def test_reports_that_do_not_belong_together_are_not_merged() -> None:
    facts = {"model": "m", "settings": {"seed": 0}}
    with pytest.raises(results.MergeError, match="one and two differ in settings"):
        results.merged([("one", facts, []), ("two", facts | {"settings": {"seed": 1}}, [])])
    with pytest.raises(results.MergeError, match="s/a is in one and in two"):
        results.merged([("one", facts, RECORDS[1:2]), ("two", facts, RECORDS[1:2])])


def test_histograms_are_of_the_differences() -> None:
    rows = [record("a", 21.0), record("b", 18.0)]
    histogram = results.histograms(rows, NAMES)[0]
    assert (histogram.title, histogram.values, histogram.better) == (
        "PSNR-Y: mine - bicubic",
        (1.0, -2.0),
        "right",
    )
    assert histogram.shown(-2.0) == "-2.00 dB"
    assert results.histograms(rows[:1], NAMES) == []


def test_card_shows_both_figures() -> None:
    pictures = {"lq": encoded(0, 5, 5), "bicubic": encoded(1, 20, 20), "ours": encoded(2, 20, 20), "gt": b""}
    made = results.card(RECORDS[1], pictures, NAMES, "number 1 of the worst")
    assert made.figures == {"PSNR-Y": ("20.00 dB", "22.00 dB"), "SSIM-Y": ("0.5000", "0.7500")}
    assert (made.name, made.before_name, made.gt, made.note) == (
        "s/a",
        "bicubic",
        None,
        "1.0 s · number 1 of the worst",
    )
    other = results.card(
        record("a", 22.0, against={"psnr_y": 21.0}), pictures | {"against": encoded(3, 20, 20)}, NAMES
    )
    assert (other.before_name, other.figures["PSNR-Y"]) == ("theirs", ("21.00 dB", "22.00 dB"))
