"""The opponent in the benchmark of pairs plays by the same recipe, and the benchmark says what it should."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from scipy.stats import ks_2samp

from resshift.degradation import imresize, realesrgan_x4
from resshift.devices import use_one_thread

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_thread() -> Iterator[None]:
    num_threads = cv2.getNumThreads()
    use_one_thread()
    yield
    cv2.setNumThreads(num_threads)


@pytest.mark.usefixtures("one_thread")
def test_the_plain_pair_follows_the_official_statistics() -> None:
    plain = load("plain_pair")
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
    plain, photos = load("plain_pair"), load("synthetic_photos")
    hq, lq = plain.plain_pair(photos.synthetic_photo(0), 256, realesrgan_x4(), np.random.default_rng(0))
    assert (hq.shape, lq.shape, hq.dtype, lq.dtype) == ((256, 256, 3), (64, 64, 3), np.uint8, np.uint8)
    shrunk = cv2.resize(hq, (64, 64), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(shrunk.reshape(-1), lq.reshape(-1))[0, 1] > 0.8


def test_synthetic_photos_are_stable_and_as_heavy_as_real_ones() -> None:
    photos = load("synthetic_photos")
    made = [photos.synthetic_photo(i) for i in range(6)]
    assert made[0] == photos.synthetic_photo(0)
    assert len(set(made)) == 6
    bits_per_pixel = 8 * np.mean([len(data) for data in made]) / (375 * 500)
    assert 2 < bits_per_pixel < 3


@pytest.mark.slow
def test_pairs_prints_a_table_and_ends_with_one_json_object() -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "pairs.py"),
        "--count",
        "8",
        "--seconds",
        "0.5",
        "--quick",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["benchmark"] == "pairs"
    assert last["file"] is None
    assert last["pairs_per_s_core"] > 0
    assert last["ratio_to_plain"] == pytest.approx(
        last["pairs_per_s_core"] / last["plain_pairs_per_s_core"], rel=1e-2
    )
    assert "decode + crop" in done.stdout


def test_a_folder_without_photos_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "pairs.py"), "--photos", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "no .jpg or .jpeg file" in done.stderr
