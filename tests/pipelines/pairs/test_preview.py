"""The preview shows the pairs that training would see, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.pairs.maker import PairMaker
from pipelines.pairs.order import stream
from pipelines.pairs.preview import describe, from_photos, from_shards, kernel_picture, preview_page
from pipelines.shards.build import ShardOptions
from pipelines.shards.parquet import read_manifest, row_groups
from pipelines.shards.prepare import prepare_here
from pipelines.shards.sources import Item, list_inputs
from resshift import degradation, images
from resshift.config import RunConfig
from resshift.degradation.jpeg import Jpeg
from resshift.degradation.kernels import Blur, GaussianKernel, PulseKernel, SincKernel
from resshift.degradation.noise import Noise
from resshift.degradation.resize import Resize
from resshift.presets import test_x4 as toy_preset
from resshift.seeds import philox

Job = Callable[..., int]


@pytest.fixture
def config() -> RunConfig:
    return replace(toy_preset(), degradation=degradation.realesrgan_x4())


def items_of(tree: Path) -> list[Item]:
    return [one for one in list_inputs(str(tree)) if isinstance(one, Item)]


def test_shards_show_the_first_pairs_of_the_run(tree: Path, tmp_path: Path, config: RunConfig) -> None:
    root = str(tmp_path / "s")
    prepare_here(str(tree), root, ShardOptions(row_group_rows=3))
    pieces = list(stream(row_groups(read_manifest(root)), config.train.seed, config.train.batch_size, 0, 13))
    make = PairMaker(root, config.train.seed, config.data, config.degradation)
    (expected,) = make.batches(pieces, [np.arange(13)])
    found = list(from_shards(root, config, 13))
    assert [sample.key for sample in found] == expected["key"].tolist()
    for sample, hq, lq in zip(found, expected["hq"], expected["lq"], strict=True):
        assert sample.pair is not None
        np.testing.assert_array_equal(sample.pair.hq_u8, hq)
        np.testing.assert_array_equal(sample.pair.lq_u8, lq)


def test_page_holds_the_pictures_and_every_operation(tree: Path, config: RunConfig) -> None:
    samples = list(from_photos(items_of(tree), config, 11))
    page = preview_page(samples, config, {"source": "<here> & there"})
    assert "&lt;here&gt; &amp; there" in page
    assert re.search(r"""(src|href)=["'](?!data:)""", page) is None
    style = page.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in html.unescape(page)  # else a browser shows it without any style
    cards = page.split('<section class="card">')[1:]
    assert len(cards) == 11
    for sample, card in zip(samples, cards, strict=True):
        assert html.escape(sample.key) in card
        if sample.pair is None:
            assert "truncated" in card
            continue
        shown = [
            images.decode(base64.b64decode(data)).pixels for data in re.findall(r"base64,([^\"]+)", card)
        ]
        np.testing.assert_array_equal(shown[0], sample.pair.hq_u8)
        np.testing.assert_array_equal(shown[1], sample.pair.lq_u8)
        assert sample.pair.params is not None
        assert card.count("<li>") == len(sample.pair.params.ops)
        assert all(html.escape(describe(op)) in card for op in sample.pair.params.ops)


def test_parameters_read_as_they_are_written_in_the_field() -> None:
    aniso = GaussianKernel(
        type="generalized_aniso", size=7, sigma_x=2.0, sigma_y=0.5, theta=np.pi / 4, beta=1.5
    )
    assert [
        describe(op)
        for op in (
            Blur(kernel=aniso),
            Blur(kernel=GaussianKernel(type="iso", size=9, sigma_x=1.25, sigma_y=1.25)),
            Blur(kernel=SincKernel(size=13, omega=1.5)),
            Blur(kernel=PulseKernel()),
            Resize(of="hq", factor=0.5, mode="area"),
            Resize(of="lq", factor=1.0, mode="bicubic"),
            Resize(of="lq", factor=1.0, mode="matlab_bicubic"),
            Noise(kind="gaussian", level=12.0, gray=True, seed=1),
            Noise(kind="poisson", level=0.5, gray=False, seed=1),
            Jpeg(quality=40),
        )
    ] == [
        *(
            "generalized aniso 7×7, σ 2.00, 0.50 at 45°, β 1.50",
            "iso 9×9, σ 1.25",
            "sinc 13×13, ω 1.50",
            "none",
        ),
        *("area, 0.500 of the clean side", "bicubic to the final size", "MATLAB bicubic to the final size"),
        *("gaussian, σ 12.0/255, grey", "poisson, scale 0.50", "quality 40"),
    ]


@pytest.mark.parametrize(
    "recipe", [degradation.face(), degradation.inpainting(), degradation.realesrgan_x4()]
)
def test_every_operation_of_every_recipe_has_words(recipe: degradation.DegradationRecipe) -> None:
    for i in range(60):
        assert all(describe(op) for op in degradation.draw(philox("preview", i), recipe).ops)


def test_kernel_is_drawn_with_its_largest_weight_white() -> None:
    picture = kernel_picture(GaussianKernel(type="iso", size=5, sigma_x=1.0, sigma_y=1.0))
    assert (picture.shape, picture.dtype, picture.max(), picture[2, 2, 0]) == ((5, 5, 1), np.uint8, 255, 255)
    np.testing.assert_allclose(picture[2, 3, 0], 255 * np.exp(-0.25), atol=1)  # square root of exp(-1 / 2)


def test_command_writes_the_page(
    tree: Path, tmp_path: Path, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "preview.html"
    arguments = ("--preset", "test-x4", "--set", "train.seed=3")
    assert job("preview", str(tree), str(out), *arguments) == 3  # broken.png
    assert "10 pairs, 1 photos without a pair" in capsys.readouterr().out
    assert out.read_text().count('<section class="card">') == 11
    assert job("preview", str(tree), str(out), *arguments, "--num", "0") == 2
    (tmp_path / "empty").mkdir()
    assert job("preview", str(tmp_path / "empty"), str(out), *arguments) == 2
    assert "no photos under" in capsys.readouterr().err
    keys = list(itertools.islice(re.findall(r"<h2>([^<]+)</h2>", out.read_text()), 3))
    assert len(set(keys)) == 3
