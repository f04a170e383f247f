"""What a bulk job may be asked for: one check, which each edge words in its own way."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.bulk.job import Job
from pipelines.bulk.request import BulkRequest
from pipelines.bulk.stages import StageOptions, UpscaleOptions
from pipelines.ledger import ledger
from pipelines.ledger.digests import DigestSet, OwnerMap
from pipelines.ledger.ledger import JobMismatch, Known, begin_job
from resshift.config import OptionError, Sampling
from resshift.models.files import write_model_config
from resshift.storage import EPOCH, Entry
from tests.faces import write_detector
from tests.holes import hole_config

OUTPUTS = UpscaleOptions(model="nearest-x4", identity="nearest-x4", scale=4)


def request(tmp_path: Path, **values: Any) -> BulkRequest:
    defaults: dict[str, Any] = {
        "source": str(tmp_path / "in"),
        "target": str(tmp_path / "out"),
        "model": "nearest-x4",
    }
    return BulkRequest(**defaults | values)


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"quality": 0}, "quality", "must lie in 1 to 100, got 0"),
        ({"max_megapixels": float("nan")}, "max_megapixels", "must be positive and at most 10000, got nan"),
        ({"price_per_hour": -1.0}, "price_per_hour", "must be at least 0, got -1.0"),
        ({"sampling": Sampling(outscale=2)}, "outscale", "must be 4 for nearest-x4, got 2"),
        ({"sampling": Sampling(steps=2)}, "steps", "must lie in 1 to 1 for nearest-x4, got 2"),
        ({"sampling": Sampling(tile_px=0)}, "tile_px", "must be at least 1 for nearest-x4, got 0"),
        (
            {"name": "../{name}"},
            "name",
            "'../{name}' gives '../picture.png': it must lie inside the target and outside _resshift/",
        ),
        (
            {"masks": "masks"},
            "masks",
            "must not be given for nearest-x4, which fills no holes, got masks",
        ),
        (
            {"sampling": Sampling(faces="yunet.onnx")},
            "faces",
            "must not be given for nearest-x4: a model of faces has scale 1 and fills no holes",
        ),
        ({"keys": "no/such/list"}, "keys", "no/such/list: No such file or directory"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_field(
    values: dict[str, Any], field: str, message: str, tmp_path: Path
) -> None:
    def check() -> None:
        made = request(tmp_path, **values)
        made.job()
        made.entries()

    with pytest.raises(OptionError) as refused:
        check()
    assert (refused.value.field, refused.value.message) == (field, message)


def test_a_model_that_fills_holes_needs_masks_and_a_job_remembers_where(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    write_model_config(tmp_path / "model", "holes", hole_config())
    model = {"model": str(tmp_path / "model")}
    with pytest.raises(OptionError, match=r"masks must be a folder or s3:// prefix for .*, got none"):
        request(tmp_path, **model).job()
    record = request(tmp_path, **model, masks="m/x").job().record()
    assert (record["masks"], record["scale"]) == ("m/x", 1)
    assert "masks" not in request(tmp_path).job().record()


def test_a_job_of_faces_needs_a_detector_and_remembers_which(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    holes = hole_config()
    write_model_config(tmp_path / "model", "faces", replace(holes, unet=replace(holes.unet, cond_mask=False)))
    detector, model = tmp_path / "cells.onnx", {"model": str(tmp_path / "model")}
    with pytest.raises(OptionError, match=r"faces must be the file of a face detector: .* not there"):
        request(tmp_path, **model, sampling=Sampling(faces=str(detector))).job()
    write_detector(detector)
    record = request(tmp_path, **model, sampling=Sampling(faces=str(detector))).job().record()
    assert record["faces"] == str(detector)
    assert record["detector"] == hashlib.sha256(detector.read_bytes()).hexdigest()
    assert not {"faces", "detector"} & request(tmp_path).job().record().keys()


def test_a_target_inside_its_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="outputs would become inputs of the next run") as refused:
        request(tmp_path, target=str(tmp_path / "in" / "x4"))
    assert refused.value.field == "target"


def test_a_request_becomes_the_job_that_it_asks_for(tmp_path: Path) -> None:
    made = request(
        tmp_path, sampling=Sampling(seed=7, tile_px=64), format="jpeg", quality=90, max_megapixels=2.5
    )
    job = made.job()
    assert job.record() == {
        "source": str(tmp_path / "in"),
        "model": "nearest-x4",
        "identity": "nearest-x4",
        "scale": 4,
        "outscale": None,
        "seed": 7,
        "tile_px": 64,
        "format": "jpeg",
        "quality": 90,
        "name": "{dir}/{stem}_x{scale}.{ext}",
        "frames": "first",
    }
    assert job.stages.limits.images.max_pixels == 2_500_000
    begin_job(made.target, job.record())
    with pytest.raises(JobMismatch, match="seed: 7 -> 8"):
        request(tmp_path, sampling=Sampling(seed=8, tile_px=64), format="jpeg", quality=90).job()


@pytest.mark.parametrize(("target", "longest"), [("out", 255), ("s3://bucket/out", 1020)])
def test_a_name_that_is_too_long_for_the_target_is_a_row_before_the_work(
    target: str, longest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "load_known", lambda *_, **__: Known(DigestSet(), OwnerMap(), Counter()))
    made = request(tmp_path, target=target, name="{name}.png")
    keys = ["e" * (longest - 4), "f" * (longest - 3), "\u00e9" * (longest // 2)]
    listed = iter([Entry(key, f"/in/{key}", 1, "e", EPOCH) for key in keys])
    job = Job(source="in", stages=StageOptions(outputs=replace(OUTPUTS, name="{name}.png"), target=target))
    (_, refused), (items, _) = made.inputs().worklist(job.stages, listed).batches()
    assert [item.key for item in items] == keys[:1]
    assert [(row["key"], row["reason"]) for row in refused] == [(key, "invalid") for key in keys[1:]]
    assert f"bytes, at most {255 if longest == 255 else 1024} are allowed" in refused[0]["message"]
