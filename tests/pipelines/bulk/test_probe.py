"""The speed of a replica before a first run, of a stand-in whose speed is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.bulk import probe
from pipelines.bulk.probe import replica_speed
from pipelines.bulk.settings import EngineSettings
from pipelines.bulk.stages import StageOptions, UpscaleOptions
from pipelines.ledger import ledger
from resshift.config import Sampling


@pytest.mark.parametrize(("seconds", "most_s"), [(4.0, 10.0), (20.0, 0.5)], ids=["large", "small"])
def test_the_speed_is_measured_before_there_is_a_ledger_that_says_it(
    seconds: float, most_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in takes so long for a megapixel or, on a busy machine, longer."""
    monkeypatch.setattr(probe, "_MOST_S", most_s)
    outputs = UpscaleOptions(model=f"nearest-x4@{seconds:g}", identity="nearest-x4", scale=4)
    stages = StageOptions(outputs=outputs, target=str(tmp_path))
    speed, told = replica_speed(stages, EngineSettings(), 1)
    assert speed is not None
    assert 0.1 / seconds < speed <= 1 / seconds
    assert told == "measured here"
    faces = replace(stages, outputs=replace(outputs, sampling=Sampling(faces="yunet.onnx")))
    assert replica_speed(faces, EngineSettings(), 1) == (None, "it depends on the faces in each picture")
    row = ledger.row("a.png", "e", "ok", width_in=1000, height_in=1000, model_seconds=2.0)
    ledger.append(str(tmp_path), [row])
    assert replica_speed(stages, EngineSettings(), 1) == (0.5, "in the ledger")
