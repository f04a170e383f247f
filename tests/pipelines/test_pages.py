"""What holds for every HTML page."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest
from jinja2 import UndefinedError

from pipelines.evaluation.page import comparison_page
from pipelines.ledger.report import JobSummary, page, summarise
from pipelines.pages import embed, render
from pipelines.pairs.preview import Sample, preview_page
from resshift.presets import test_x4 as toy_preset

HOSTILE = "<script>alert('x')</script>\" onload=\"alert(1)"


@pytest.fixture(params=["comparison", "report", "preview"])
def html(request: pytest.FixtureRequest, tmp_path: object) -> str:
    if request.param == "comparison":
        return comparison_page(title=HOSTILE, lead=HOSTILE, cards=[], facts={HOSTILE: HOSTILE})
    if request.param == "report":
        summary = JobSummary(runs=[{"run": HOSTILE, "started": 0.0, "ended": 1.0, "replica_seconds": 1.0}])
        summary.runs[0] |= {"busy_share": None, "facts": {HOSTILE: HOSTILE}}
        summary.counts["ok"] = summary.notes[HOSTILE] = summary.counts[f"failed: {HOSTILE}"] = 1
        summary.examples[HOSTILE] = HOSTILE
        summary.timeline = [(0.0, 1), (1.0, 1)]
        others = summarise(str(tmp_path))[1]
        return page(f"s3://bucket/{HOSTILE}", summary, others, {HOSTILE: HOSTILE}, None)
    return preview_page([Sample(HOSTILE, None, HOSTILE)], toy_preset(), {HOSTILE: HOSTILE})


def test_no_value_becomes_markup(html: str) -> None:
    body = html.partition("<body>")[2]
    assert "<script" not in body
    assert not re.search(r"<[^>]*\sonload", body)
    assert body.count("&lt;script&gt;") >= 3


def test_the_policy_allows_the_style_and_script_of_the_page(html: str) -> None:
    """And what it does not allow, the page does not have: a browser would leave it out."""
    policy = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', html)
    parts = re.findall(r"<(style|script)>(.*?)</\1>", html, re.DOTALL)
    hashes = {
        tag: base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for tag, content in parts
    }
    sources = "".join(f"{tag}-src 'sha256-{digest}'; " for tag, digest in hashes.items())
    assert policy == [f"default-src 'none'; img-src data:; {sources}base-uri 'none'; form-action 'none'"]
    assert not re.search(r"<[^>]*\s(style|on\w+)=", html.partition("<body>")[2])
    assert html.startswith("<!doctype html>\n")


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'lead' is undefined"):
        render("pairs/preview.html", title="x", facts={}, cards=[])


def test_an_embedded_picture_keeps_its_bytes() -> None:
    picture = embed(b"\x00\xffpng", "image/png", 3, 2)
    assert base64.b64decode(picture.uri.removeprefix("data:image/png;base64,")) == b"\x00\xffpng"
    assert picture.size == "3 × 2"
