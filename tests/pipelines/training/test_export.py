"""Export: a directory that the library loads, a card that says what the run says, a push only when asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.training.export import export, publish_model
from pipelines.training.reconstruction import centre, report
from pipelines.training.trainer import begin_run
from resshift import Upscaler, storage
from resshift.config import ConfigError
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.presets import test_x4 as toy_preset
from resshift.training import checkpoint
from resshift.training.autoencoder import build_autoencoder
from resshift.training.autoencoder import test_vq as toy_vq
from resshift.training.losses import Objective
from resshift.training.step import DiffusionLearner, build_network
from resshift.weights import save_safetensors, state_to_store

CONFIG = toy_preset()


@pytest.fixture
def out(tmp_path: Path) -> str:
    """Return a run directory as a finished run leaves it."""
    out = str(tmp_path / "run")
    begin_run(CONFIG, "s3://bucket/shards", out)
    learner = DiffusionLearner(
        CONFIG, build_network(CONFIG), Objective(CONFIG.model, CONFIG.loss, PixelUnshuffle(4))
    )
    checkpoint.write(tmp_path / "c", checkpoint.take(learner.state), CONFIG)
    publish_model(tmp_path / "c", out, CONFIG)
    line = json.dumps({"step": 20, "psnr_y": 25.125, "ssim_y": 0.5})
    storage.write_bytes(f"{out}/validation/step-00000020.jsonl", (line + "\n").encode())
    storage.write_bytes(f"{out}/best.json", b'{"step": 20, "figure": "psnr_y", "value": 25.125}\n')
    return out


def test_exported_directory_is_a_model_with_a_card(out: str, tmp_path: Path) -> None:
    target = export(out, CONFIG, 20, str(tmp_path / "exported"))
    assert sorted(path.name for path in Path(target).iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    result = Upscaler.from_pretrained(target, device="cpu")(np.zeros((32, 32, 3), np.uint8))
    assert result.shape == (128, 128, 3)
    card = Path(target, "README.md").read_text()
    assert card.startswith("---\nlicense: unknown\nlibrary_name: resshift\npipeline_tag: image-to-image\n")
    for fact in (
        "# Model card: test-x4",
        "20 steps of 8 samples = 160, fp32, seed 0",
        "s3://bucket/shards",
        "| 20 | 25.1250 | 0.5000 |",
    ):
        assert fact in card
    assert json.loads(card.split("```json")[1].split("```")[0])["preset"] == "test-x4"


def test_push_is_made_when_asked(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, Any] = {}

    def upload_folder(repo_id: str, folder_path: str, commit_message: str) -> str:
        pushed.update(repo=repo_id, names=sorted(path.name for path in Path(folder_path).iterdir()))
        return f"https://hub/{repo_id}"

    hub = SimpleNamespace(create_repo=lambda repo, exist_ok: None, upload_folder=upload_folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert export(out, CONFIG, 20, "hf://owner/name") == "https://hub/owner/name"
    assert pushed == {"repo": "owner/name", "names": ["README.md", "config.json", "model.safetensors"]}
    with pytest.raises(ConfigError, match="hf://OWNER/NAME"):
        export(out, CONFIG, 20, "hf://name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'resshift\[models\]'"):
        export(out, CONFIG, 20, "hf://owner/name")


@pytest.mark.parametrize(("shape", "expected"), [((100, 70, 3), (32, 32, 3)), ((31, 70, 3), (28, 32, 3))])
def test_centre_is_a_multiple_of_the_factor(
    shape: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    assert centre(np.zeros(shape, np.uint8), 32, 4).shape == expected


def test_report_measures_an_autoencoder(tmp_path: Path) -> None:
    config = toy_vq()
    save_safetensors(
        state_to_store(build_autoencoder(config, torch.device("cpu"))), tmp_path / "vq.safetensors"
    )
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(np.full((40, 48, 3), 100 + i, np.uint8)).save(tmp_path / f"photos/{i}.png")
    (tmp_path / "photos/broken.png").write_bytes(b"no picture")
    table, failed = report(
        str(tmp_path / "photos"), config, str(tmp_path / "vq.safetensors"), str(tmp_path / "out")
    )
    summary = json.loads((tmp_path / "out/report.json").read_text())
    assert (failed, summary["pictures"], summary["codes"]) == (1, 3, 64)
    assert [row["status"] for row in summary["rows"]].count("failed") == 1
    assert 0 < summary["codes_used"] <= 64
    assert summary["means"]["quantised"].keys() == {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}
    assert [line[0] for line in table] == ["", "quantised", "continuous", "codes used"]
    assert Image.open(tmp_path / "out/pictures.png").size == (64, 96)
