"""The opponent in the benchmark of pairs plays by the same recipe, and the benchmark says what it should."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import ray
from scipy.stats import ks_2samp

from resshift.config import DataConfig
from resshift.degradation import imresize, realesrgan_x4
from resshift.devices import use_one_thread
from tests.scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture
def one_thread() -> Iterator[None]:
    num_threads = cv2.getNumThreads()
    use_one_thread()
    yield
    cv2.setNumThreads(num_threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_plain_pair_follows_the_official_statistics() -> None:
    plain = load_script("benchmarks/plain_pair.py")
    with np.load(ROOT / "tests" / "parity" / "degradation_statistics.npz") as arrays:
        hq_u8, official = arrays["image_u8"], arrays["train_x4"]
    reference = imresize(hq_u8 / 255, 0.25)
    rng = np.random.default_rng(0)
    psnr = []
    for _ in range(120):
        lq_u8 = plain.degrade(np.ascontiguousarray(hq_u8[..., ::-1]), realesrgan_x4(), rng)[..., ::-1]
        psnr.append(-10 * math.log10(((lq_u8 / 255 - reference) ** 2).mean()))
    assert ks_2samp(psnr, official[:, 0]).pvalue > 1e-3  # pyright: ignore[reportAttributeAccessIssue]


def test_the_plain_crop_is_a_square_of_the_photo() -> None:
    plain, photos = load_script("benchmarks/plain_pair.py"), load_script("benchmarks/synthetic_photos.py")
    hq, lq = plain.plain_pair(photos.synthetic_photo(0), 256, realesrgan_x4(), np.random.default_rng(0))
    assert (hq.shape, lq.shape, hq.dtype, lq.dtype) == ((256, 256, 3), (64, 64, 3), np.uint8, np.uint8)
    shrunk = cv2.resize(hq, (64, 64), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(shrunk.reshape(-1), lq.reshape(-1))[0, 1] > 0.8


@pytest.mark.slow
def test_synthetic_photos_are_stable_and_as_heavy_as_real_ones() -> None:
    photos = load_script("benchmarks/synthetic_photos.py")
    made = [photos.synthetic_photo(i) for i in range(6)]
    assert made[0] == photos.synthetic_photo(0)
    assert len(set(made)) == 6
    bits_per_pixel = 8 * np.mean([len(data) for data in made]) / (375 * 500)
    assert 2 < bits_per_pixel < 3


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_function_is_a_table_and_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = load_script("benchmarks/pairs.py")
    assert pairs.main(["--count", "4", "--seconds", "0", "--quick", "--no-ray"]) == 0
    printed = capsys.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert last["benchmark"] == "pairs"
    assert last["file"] is None
    assert last["pairs_per_s_core"] > 0
    assert last["ratio_to_plain"] == pytest.approx(
        last["pairs_per_s_core"] / last["plain_pairs_per_s_core"], rel=1e-2
    )
    assert "decode + crop" in printed


def test_the_pipeline_has_a_rate_and_an_overhead(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the cluster of the run, from the first pair on."""
    del ray_cluster
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # processes of the benchmark import it by name
    module = importlib.import_module("pairs_on_ray")
    cluster = SimpleNamespace(
        init=lambda **_: None,
        shutdown=lambda: None,
        cluster_resources=ray.cluster_resources,
        available_resources=ray.available_resources,
    )
    monkeypatch.setattr(module, "ray", cluster)
    monkeypatch.setattr(module, "_START_S", 0.0)
    monkeypatch.setattr(module, "rows_per_task", lambda *_: 0)
    photo = load_script("benchmarks/synthetic_photos.py").synthetic_photo(0)
    crop = DataConfig(crop="random", crop_px=256)
    figures = module.measure_pipeline([("a", photo), ("b", photo)], crop, 0.1, 1)
    assert figures["ray_pairs_per_s_2"] > 0
    assert figures["bare_pairs_per_s_2"] > 0
    assert figures["ray_overhead"] == 1 - figures["ray_pairs_per_s_2"] / figures["bare_pairs_per_s_2"]


def test_a_folder_without_photos_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no \.jpg or \.jpeg file"):
        load_script("benchmarks/pairs.py").main(["--photos", str(tmp_path), "--no-ray"])
