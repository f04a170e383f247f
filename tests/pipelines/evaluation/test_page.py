"""The comparison page: what is in the file, and what a real browser makes of it."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation.page import Card, Histogram, comparison_page
from resshift.images.exif import ORIENTATION

HOSTILE = "<script>alert('x')</script>\" onload=\"alert(1)"
URL_ATTRIBUTES = (
    "src",
    "href",
    "srcset",
    "action",
    "formaction",
    "data",
    "poster",
    "background",
    "xlink:href",
    "ping",
)


def encoded(width: int, height: int, extension: str = ".png", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(extension, pixels)[1].tobytes()


CARD = Card(
    name="harbour",
    lq=encoded(60, 40),
    before=encoded(240, 160, ".jpg", seed=1),
    ours=encoded(240, 160, ".webp", seed=2),
    gt=encoded(240, 160, seed=3),
    figures={"PSNR-Y": ("25.50 dB", "26.10 dB"), "LPIPS": ("0.312", "0.184")},
    note="0.8 s",
)


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text outside style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def render(cards: Sequence[Card], **other: object) -> str:
    return comparison_page(title="Title", lead="Lead.", cards=cards, **other)  # type: ignore[arg-type]


def marked(html: str) -> list[str]:
    """Return the values that are marked as better, in the order of the page."""
    return re.findall(r'<span class="better">better</span> <strong>(.*?)</strong>', html)


def test_page_refers_to_nothing_but_embedded_pictures() -> None:
    html = render([CARD, replace(CARD, gt=None)], facts={"model": "tiny-x4"})
    urls = [
        value
        for _, attributes in Page(html).tags
        for name, value in attributes.items()
        if name in URL_ATTRIBUTES
    ]
    assert len(urls) == 1 + 4 + 3  # the empty icon, and each picture once
    assert all(url is not None and url.startswith("data:") for url in urls)
    assert not re.search(r"https?:|@import|url\(|\bfetch\(|XMLHttpRequest|<link rel=.stylesheet", html)


def test_policy_names_style_and_script_by_hash_and_allows_no_request() -> None:
    policy = next(
        meta["content"]
        for meta in Page(render([CARD])).all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "data:"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", directives["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", directives["style-src"])


def test_every_picture_has_an_alternative_text_and_the_page_a_language() -> None:
    page = Page(render([CARD]))
    assert [image["alt"] for image in page.all("img")] == [
        "harbour, bicubic",
        "harbour, ours",
        "harbour, low resolution",
        "harbour, ground truth",
    ]
    assert page.all("html") == [{"lang": "en"}]


def test_all_text_of_the_caller_is_escaped() -> None:
    html = comparison_page(
        title=HOSTILE,
        lead=HOSTILE,
        cards=[replace(CARD, name=HOSTILE, note=HOSTILE, figures={HOSTILE: (HOSTILE, "1 <b>")})],
        summary=[(HOSTILE, "b"), ("c", HOSTILE)],
        facts={HOSTILE: HOSTILE},
    )
    page = Page(html)
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert not [
        attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)
    ]
    assert (
        page.text.count(HOSTILE) == 11
    )  # twice each: title, summary, facts; once: lead, name, note, a metric and its value
    assert page.all("img")[0]["alt"] == f"{HOSTILE}, bicubic"


def test_text_that_looks_like_a_placeholder_stays() -> None:
    page = Page(render([replace(CARD, name="$facts ${cards} $$")]))
    assert "$facts ${cards} $$" in page.text


@pytest.mark.parametrize("num_cards", [0, 1, 3])
def test_page_has_one_labelled_slider_per_card(num_cards: int) -> None:
    page = Page(render([replace(CARD, name=f"picture {i}") for i in range(num_cards)]))
    sliders = [attributes for attributes in page.all("input") if attributes["type"] == "range"]
    assert [(slider["aria-label"] or "").split(":")[0] for slider in sliders] == [
        f"picture {i}" for i in range(num_cards)
    ]
    radio_groups = {attributes["name"] for attributes in page.all("input") if attributes["type"] == "radio"}
    assert len(radio_groups) == num_cards


def test_missing_ground_truth_leaves_out_its_picture() -> None:
    with_gt, without = Page(render([CARD])), Page(render([replace(CARD, gt=None)]))
    assert "ground truth" in with_gt.text
    assert "ground truth" not in without.text
    assert (len(with_gt.all("img")), len(without.all("img"))) == (4, 3)


def test_pictures_are_embedded_unchanged_with_their_type_and_size() -> None:
    images = Page(render([CARD])).all("img")
    expected = [("jpeg", CARD.before), ("webp", CARD.ours), ("png", CARD.lq), ("png", CARD.gt)]
    for image, (kind, data) in zip(images, expected, strict=True):
        head, _, body = (image["src"] or "").partition(",")
        assert head == f"data:image/{kind};base64"
        assert base64.b64decode(body) == data
    assert [(image["width"], image["height"]) for image in images] == [
        ("240", "160"),
        ("240", "160"),
        ("60", "40"),
        ("240", "160"),
    ]


def test_size_of_a_turned_photograph_is_the_one_it_is_seen_at() -> None:
    turned, exif = io.BytesIO(), Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (40, 60)).save(turned, "JPEG", exif=exif)
    low = Page(render([replace(CARD, lq=turned.getvalue())])).all("img")[2]
    assert (low["width"], low["height"]) == ("60", "40")


def test_summary_facts_figures_and_note_appear() -> None:
    page = Page(
        render(
            [CARD],
            summary=[("method", "PSNR-Y"), ("bicubic", "25.50")],
            facts={"model": "tiny-x4", "seed": "0"},
        )
    )
    for text in (
        "PSNR-Y ↑",
        "LPIPS ↓",
        "25.50 dB",
        "26.10 dB",
        "0.312",
        "0.184",
        "60 × 40 → 240 × 160 px · 0.8 s",
        "method",
        "tiny-x4",
    ):
        assert text in page.text
    assert len(page.all("table")) == 2
    assert len(page.all("dt")) == 2


def test_empty_parts_leave_nothing_behind() -> None:
    page = Page(render([replace(CARD, figures={})]))
    assert not page.all("table")
    assert not page.all("dl")


@pytest.mark.parametrize(
    ("name", "bicubic", "ours", "better"),
    [
        ("PSNR-Y", "25.50 dB", "26.10 dB", ["26.10 dB"]),
        ("PSNR-Y", "26.10 dB", "25.50 dB", ["26.10 dB"]),
        ("PSNR", "inf dB", "9 dB", ["inf dB"]),
        ("ssim", "0.9", "0.10", ["0.9"]),
        ("LPIPS (alex)", "0.312", "0.184", ["0.184"]),
        ("LPIPS", "1.2e-3", "0.01", ["1.2e-3"]),
        ("NIQE", "\N{MINUS SIGN}1", "2", ["\N{MINUS SIGN}1"]),
        ("Q-Align ↑", "3.1", "3.2", ["3.2"]),
        ("blur ↓", "3.1", "3.2", ["3.1"]),
        ("PSNR-Y ↓", "3.1", "3.2", ["3.1"]),  # the arrow decides
        ("edges", "3.1", "3.2", []),
        ("PSNR-Y", "25.5", "25.50", []),
        ("PSNR-Y", "–", "25.50", []),
    ],
)
def test_the_better_value_is_marked_in_words(name: str, bicubic: str, ours: str, better: list[str]) -> None:
    assert marked(render([replace(CARD, figures={name: (bicubic, ours)})])) == better


def test_arrow_given_by_the_caller_is_not_doubled() -> None:
    text = Page(render([replace(CARD, figures={"LPIPS ↓": ("0.3", "0.2")})])).text
    assert text.count("↓") == 1


def test_another_model_stands_where_bicubic_stands() -> None:
    page = Page(render([replace(CARD, before_name="theirs")]))
    assert "bicubic" not in page.text
    assert page.text.count("theirs") == 3  # left of the slider, among the details, above the figures
    assert page.all("img")[0]["alt"] == "harbour, theirs"


def bars(html: str, kind: str) -> list[tuple[int, float]]:
    """Return (place, height) of the bars of one kind."""
    found = [rect for rect in Page(html).all("rect") if rect["class"] == kind]
    return [(int(rect["x"] or 0) // 10, float(rect["height"] or 0)) for rect in found]


def test_histogram_has_zero_in_the_middle_and_the_better_side_filled() -> None:
    histogram = Histogram(
        title="PSNR <1>", values=(3.0, 3.0, 0.1, -1.0), shown="{:+.1f} dB".format, better="right"
    )
    html = render([], histograms=[histogram])
    assert bars(html, "good") == [(12, 50.0), (23, 100.0)]
    assert bars(html, "bad") == [(8, 50.0)]
    text = Page(html).text
    assert all(part in text for part in ("PSNR <1>", "-3.0 dB", "better in 3 of 4", "+3.0 dB"))
    assert bars(render([], histograms=[replace(histogram, better="left")]), "good") == [(8, 50.0)]
    assert bars(render([], histograms=[replace(histogram, values=(0.0,))]), "good") == [(12, 100.0)]


def test_a_histogram_needs_finite_values() -> None:
    for values in ((), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="needs finite values"):
            Histogram(title="x", values=values, shown=str, better="left")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before": encoded(60, 40)}, "before of 'harbour' is 60 × 40"),
        ({"gt": encoded(60, 40)}, "gt of 'harbour' is 60 × 40"),
        ({"lq": encoded(60, 40, ".tiff")}, "lq of 'harbour' is TIFF"),
        ({"lq": b"<svg/>"}, "is an SVG drawing"),
        ({"focus": (0.5, 1.5)}, "focus"),
    ],
)
def test_what_a_page_cannot_show_is_an_error(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render([replace(CARD, **change)])  # type: ignore[arg-type]


def test_ragged_summary_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        render([], summary=[("a", "b"), ("c",)])


# Runs after the page has started; it plays a visitor with keyboard and mouse. Synthetic pointers cannot be
# captured.
VISITOR = """<script>
addEventListener("DOMContentLoaded", () => setTimeout(() => {
  Element.prototype.setPointerCapture = () => {};
  const seen = {};
  const card = document.querySelector(".card");
  const stage = card.querySelector(".stage");
  const slider = stage.querySelector("input");
  const views = card.querySelector(".views");
  const box = stage.getBoundingClientRect();
  const corner = () => views.querySelector("img").style.transform;
  const pointer = (type, x, y) => stage.dispatchEvent(new PointerEvent(type, {
    bubbles: true, button: 0, pointerId: 1,
    clientX: box.left + x * box.width, clientY: box.top + y * box.height }));
  const settled = () =>
    stage.style.getPropertyValue("--position") + " " + slider.getAttribute("aria-valuetext");

  seen.start = settled();
  slider.value = 25; slider.dispatchEvent(new Event("input", { bubbles: true }));
  seen.input = settled();
  pointer("pointerdown", 0.3, 0.5); pointer("pointermove", 0.6, 0.5);
  pointer("pointermove", 0.75, 0.5); pointer("pointerup", 0.75, 0.5);
  seen.drag = settled();
  pointer("pointerdown", 0, 0); pointer("pointerup", 0, 0);
  seen.click = settled() + " " + corner();
  views.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  seen.key = corner();
  seen.zooms = "";
  for (const choice of card.querySelectorAll(".zoom input")) {
    choice.click();
    const width = views.querySelectorAll("img")[2].getBoundingClientRect().width;
    const whole = views.querySelector(".window").clientWidth;
    seen.zooms += choice.value + ":" + (width === whole ? "whole" : width / 240) + " ";
  }
  seen.versions = Array.from(views.querySelectorAll("img"), (image) => image.alt.split(", ")[1]).join();
  seen.broken = Array.from(document.images).filter((image) => !image.naturalWidth).length;
  seen.sideways = document.documentElement.scrollWidth > innerWidth;
  for (const name in seen) document.body.setAttribute("data-seen-" + name, seen[name]);
}));
</script>"""


def browse(page: Path, profile: Path) -> tuple[Page, list[str]]:
    """Open a file in Chromium; return the document after the scripts ran and what was written to the
    console.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    quiet = (
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
    )
    where = (
        f"--user-data-dir={profile}",
        "--window-size=1280,900",
        "--virtual-time-budget=3000",
        "--dump-dom",
        page.as_uri(),
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *quiet, *where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Page(done.stdout), [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.slow
def test_browser_runs_the_page_and_refuses_any_other_script(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    html = render([CARD, replace(CARD, gt=None)])
    path.write_text(
        html.replace("</main>", "</main><script>document.body.dataset.foreign = 1</script>"), encoding="utf-8"
    )
    page, console = browse(path, tmp_path / "profile")
    cards = [attributes for attributes in page.all("section") if "data-started" in attributes]
    assert len(cards) == 2
    assert "data-foreign" not in page.all("body")[0]
    assert len(console) == 1, console  # the refusal, which also shows that complaints would be seen
    assert "Content Security Policy" in console[0]


@pytest.mark.slow
def test_browser_slider_and_detail_follow_keyboard_and_pointer(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    html = re.sub(
        r'<meta http-equiv="Content-Security-Policy".*?>', "", render([CARD, replace(CARD, gt=None)])
    )
    path.write_text(html.replace("</main>", "</main>" + VISITOR), encoding="utf-8")
    page, console = browse(path, tmp_path / "profile")
    assert console == []
    seen = {name.removeprefix("data-seen-"): value for name, value in page.all("body")[0].items()}
    assert seen.pop("zooms") == "0:whole 1:1 2:2 4:4 "
    assert seen == {
        "start": "50% 50 % bicubic, 50 % ours",
        "input": "25% 25 % bicubic, 75 % ours",
        "drag": "75% 75 % bicubic, 25 % ours",
        "click": "75% 75 % bicubic, 25 % ours translate(0px, 0px)",
        "key": "translate(-24px, 0px)",
        "versions": "low resolution,bicubic,ours,ground truth",
        "broken": "0",
        "sideways": "false",
    }
