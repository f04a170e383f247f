"""The table beside other models: bicubic interpolation that another program has made is bicubic
interpolation, and a picture that is the truth is better by its whole error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation.evaluate import bicubic_resized
from resshift.degradation.resize import imresize
from resshift.metrics.psnr_ssim import luma, psnr
from tests.scripts import load_script

peers = load_script("benchmarks/peers.py")


def test_paired_differences_to_folders_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_bicubic: list[float] = []
    for i in range(3):
        hq = np.random.default_rng(i).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        lq = np.rint(imresize(hq.astype(np.float64), 1 / 4).clip(0, 255)).astype(np.uint8)
        by_bicubic = bicubic_resized(lq, 4)
        of_bicubic.append(psnr(luma(by_bicubic), luma(hq)))
        for folder, picture in (
            ("lq", lq),
            ("gt", hq),
            ("same/noise", by_bicubic),
            ("shifted/noise", by_bicubic ^ 1),
        ):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / folder / f"{i}.png")
    arguments = ["--set", f"noise={tmp_path / 'lq'}:{tmp_path / 'gt'}", "--out", str(tmp_path / "out")]
    for name in ("same", "shifted"):
        arguments += ["--method", f"{name}={tmp_path / name}"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *arguments, "--no-record"])
    assert peers.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["sets"]["noise"]
    assert found["same"]["psnr_y"] == {"mean": pytest.approx(np.mean(of_bicubic)), "pictures": 3}
    assert found["bicubic"]["psnr_y_difference"] == [0, 0, 0]
    mean, low, high = found["shifted"]["psnr_y_difference"]
    assert low <= mean <= high
    assert mean != 0
    page = (tmp_path / "out" / "index.html").read_text()
    files = {part.split('"')[0] for part in page.split('src="')[1:]}
    assert len(files) == 3 * 4  # bicubic, same, shifted, truth
    assert all((tmp_path / "out" / file).is_file() for file in files)
