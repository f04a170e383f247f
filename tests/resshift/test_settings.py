"""Every setting is explained, in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.bulk.settings import BulkSettings
from resshift.command.main import main
from resshift.config import flatten, to_dict, with_settings
from resshift.presets import PRESETS, preset
from resshift.settings import listing, settings_of
from resshift.training.autoencoder import vq_f4

DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"


@pytest.mark.parametrize("config", [*map(preset, PRESETS), vq_f4(), BulkSettings()])
def test_every_setting_has_a_meaning(config: Any) -> None:
    settings = list(settings_of(config))
    assert [setting.path for setting in settings if not setting.meaning] == []
    # Of stored configurations.
    left_out = {
        "data.taught",
        "degradation.camera_share",
        "degradation.noise3_prob",
        "degradation.noise1.correlated_prob",
        "degradation.noise2.correlated_prob",
        "model.hole",
        "model.schedule.trained_steps",
        "model.unet.lq_ratio",
        "model.unet.cond_mask",
        "model.unet.padding",
        "model.unet.regression",  # none
        "optim.lr_batch",
        "optim.lr_rule",
        "optim.muon",
        "stages",
    }
    picture = ("charbonnier", "fourier", "features", "artifacts", "adversary", "features_trunk")
    left_out |= {f"loss.{name}" for name in picture} | {"data.degrade_on"}
    assert {setting.path for setting in settings} - left_out == flatten(to_dict(config)).keys() - left_out


@pytest.mark.parametrize("config", [*map(preset, PRESETS), vq_f4(), BulkSettings()])
def test_what_is_listed_can_be_set(config: Any) -> None:
    assert with_settings(config, [f"{one.path}={one.value}" for one in settings_of(config)]) == config


def test_one_section_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "realsr-x4-s4", "data.crop", "model.schedule.kappa"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if not line.startswith(" ")] == [
        "model.schedule.kappa=2.0    (number)",
        "data.crop=short_side    (short_side | random | scaled | distorted)",
    ]
    assert main(["settings", "tiny-x5"]) == 2
    assert "allowed: realsr-x4-s15, " in capsys.readouterr().err


def test_the_document_is_the_listing() -> None:
    """To write it again: python -m tests.resshift.test_settings"""
    assert DOCUMENT.read_text() == document()


def document() -> str:
    parts = [
        "# Settings",
        "What `--set section.field=value` changes. Lists and ranges are written as `1,30`, nothing as\n"
        "`null`. The texts are those of the docstrings; `resshift settings PRESET` prints those of one.",
        "## `jobs/train.py`, with the values of tiny-x4",
        f"```\n{listing(preset('tiny-x4'))}\n```",
        "## `jobs/train_autoencoder.py`, loss of vq-f4 (the rest as above)",
        f"```\n{listing(vq_f4(), ('loss',))}\n```",
        "## `jobs/upscale.py` and `bulk` of an endpoint (`target.*` as `source.*`)",
        f"```\n{listing(BulkSettings(), ('output', 'limits', 'select', 'work', 'engine', 'source'))}\n```",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
