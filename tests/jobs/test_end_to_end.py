"""From photos to a model to upscaled photos, through Ray, with the commands that users type."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from pipelines.ledger import ledger
from resshift import images, storage
from resshift.config import Sampling
from resshift.upscaler import Upscaler

# Two trainings stand behind the first test that needs a model; starting Ray workers takes minutes on a busy
# machine.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200), pytest.mark.usefixtures("ray_cluster")]
Job = Callable[..., int]
NUM_PHOTOS = 24


def photo(seed: int, height: int = 72, width: int = 80) -> np.ndarray:
    """A smooth coloured picture with an edge, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3)).astype(np.float32)
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    picture[:, width // 3 :] *= 0.6
    return picture.clip(0, 255).astype(np.uint8)


def encoded(array: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, format, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def shards(work: Path, job: Job, ray_cluster: None) -> Path:
    tree = work / "photos"
    for i in range(NUM_PHOTOS):
        (tree / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        (tree / f"class{i % 3}" / f"{i:02d}.png").write_bytes(encoded(photo(i)))
    (tree / "broken.jpg").write_bytes(encoded(photo(99), "JPEG")[:200])
    assert job("prepare", str(tree), str(work / "shards")) == 3
    return work / "shards"


@pytest.fixture(scope="module")
def trained(work: Path, shards: Path, job: Job) -> Path:
    """A run of 12 steps with two workers: interrupted after 6, then the same command again."""
    arguments = ("--preset", "test-x4", "--data", str(shards), "--out", str(work / "run"), "--workers", "2")
    settings = (
        "--set",
        "train.checkpoint_every=6",
        "--set",
        "train.log_every=3",
        "--set",
        "optim.warmup_steps=0",
    )
    assert job("train", *arguments, *settings, "--set", "train.steps=6") == 0
    assert job("train", *arguments, *settings, "--set", "train.steps=12") == 0
    return work / "run"


def test_prepare_gives_every_input_a_row(
    shards: Path, work: Path, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["totals"] == {"rows": NUM_PHOTOS + 1, "ok": NUM_PHOTOS}
    assert [shard["reasons"] for shard in manifest["shards"]] == [{"truncated": 1}]
    capsys.readouterr()
    assert job("prepare", str(work / "photos"), str(shards)) == 3
    assert "shards reused 1" in capsys.readouterr().out


def test_training_resumes_where_it_stopped(trained: Path) -> None:
    logs = [
        json.loads(line)
        for path in sorted((trained / "metrics").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert [line["step"] for line in logs] == [3, 6, 9, 12]  # nothing was done twice
    record = json.loads((trained / "step-00000012" / "run.json").read_text())
    assert record["step"] == 12
    assert record["fingerprint"] == json.loads((trained / "run.json").read_text())["fingerprint"]
    assert sorted(path.name for path in (trained / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_averaged_weights_are_published(trained: Path) -> None:
    published, averaged = (
        load_file(trained / "model" / "model.safetensors"),
        load_file(trained / "step-00000012" / "ema.safetensors"),
    )
    plain = load_file(trained / "step-00000012" / "model.safetensors")
    assert all(np.array_equal(published[key], averaged[key]) for key in averaged)
    assert any(not np.array_equal(plain[key], averaged[key]) for key in averaged)


def test_another_configuration_is_refused(
    trained: Path, shards: Path, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--preset",
        "test-x4",
        "--data",
        str(shards),
        "--out",
        str(trained),
        "--workers",
        "2",
        "--set",
        "optim.lr=0.1",
    )
    assert job("train", *arguments) == 2
    error = capsys.readouterr().err
    assert "optim.lr: 0.0005 -> 0.1" in error
    assert "train.steps" not in error  # a run may go on for longer


HOSTILE = {
    "fine.png": (encoded(photo(1)), "ok", ""),
    "sub/fine.jpg": (encoded(photo(2), "JPEG", quality=90), "ok", ""),
    "grey.png": (encoded(photo(3)[..., 0]), "ok", ""),
    "alpha.png": (encoded(np.dstack([photo(4), photo(5)[..., 0]])), "ok", ""),
    "sixteen.png": (cv2.imencode(".png", photo(6).astype(np.uint16) * 257)[1].tobytes(), "ok", ""),
    "one.png": (encoded(photo(7, 1, 1)), "ok", ""),
    "odd name \u00e9 \U0001f408.png": (encoded(photo(8, 33, 21)), "ok", ""),
    "truncated.png": (encoded(photo(9))[:-300], "failed", "truncated"),
    "empty.jpg": (b"", "failed", "empty"),
    "page.jpg": (b"<html>404</html>", "failed", "not_an_image"),
    "fine.webp": (
        encoded(photo(1), "WEBP", lossless=True),
        "failed",
        "name_collision",
    ),  # fine.png has the name fine_x4.png
}


def _cmyk() -> bytes:
    out = io.BytesIO()
    Image.fromarray(photo(10)).convert("CMYK").save(out, "JPEG")
    return out.getvalue()


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return encoded(photo(11), "JPEG", exif=exif)


@pytest.fixture(scope="module")
def hostile(work: Path) -> Path:
    folder = work / "hostile"
    for name, (data, _, _) in HOSTILE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "cmyk.jpg").write_bytes(_cmyk())
    (folder / "rotated.jpg").write_bytes(_rotated())
    # A header that promises 100 000 x 100 000 pixels in a file of a few bytes.
    bomb = bytearray(encoded(photo(12)))
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2
    (folder / "bomb.png").write_bytes(bytes(bomb))
    return folder


def test_bulk_job_gives_every_input_its_row(
    hostile: Path, trained: Path, work: Path, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = work / "upscaled", str(trained / "model")
    assert job("upscale", str(hostile), str(out), "--model", model) == 3
    rows = {row["key"]: row for row in ledger.read(str(out)).to_pylist()}
    assert len(rows) == len(HOSTILE) + 3
    for name, (_, status, reason) in HOSTILE.items():
        assert (rows[name]["status"], rows[name]["reason"]) == (status, reason), name
    assert rows["cmyk.jpg"]["status"] == "ok"
    assert (rows["rotated.jpg"]["width_in"], rows["rotated.jpg"]["height_in"]) == (72, 80)
    assert rows["bomb.png"]["status"] == "failed"

    for row in rows.values():
        if row["status"] == "ok":
            picture = images.decode((out / row["output"]).read_bytes())
            assert (picture.width, picture.height) == (4 * row["width_in"], 4 * row["height_in"])
            assert (picture.width, picture.height) == (row["width_out"], row["height_out"])
    assert images.decode((out / "sixteen_x4.png").read_bytes()).pixels.dtype == np.uint16
    assert images.decode((out / "grey_x4.png").read_bytes()).pixels.shape[2] == 1
    assert images.decode((out / "alpha_x4.png").read_bytes()).alpha is not None

    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert job("upscale", str(hostile), str(out), "--model", model) == 3
    assert f"0 to do, {len(rows)} done before, 0 left out" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before  # nothing was done twice

    (hostile / "truncated.png").write_bytes(encoded(photo(9)))  # repaired by its owner
    assert job("upscale", str(hostile), str(out), "--model", model, "--retry-failed") == 3
    assert {row["key"]: row["status"] for row in ledger.read(str(out)).to_pylist()}["truncated.png"] == "ok"

    assert job("upscale", str(hostile), str(out), "--model", model, "--seed", "1") == 2
    assert "seed: 0 -> 1" in capsys.readouterr().err

    assert (
        job("upscale", str(hostile), str(out), "--verify") == 3
    )  # failed items, but every output is as recorded
    assert "0 outputs differ" in capsys.readouterr().out
    contents = {path: path.read_bytes() for path in out.rglob("*.png")}
    (out / "fine_x4.png").write_bytes(b"overwritten")
    (out / "grey_x4.png").unlink()
    assert job("upscale", str(hostile), str(out), "--verify") == 3
    shown = capsys.readouterr().out
    assert "2 outputs differ from the ledger; --repair redoes 2" in shown
    assert "corrupt: fine_x4.png" in shown
    assert "missing: grey_x4.png" in shown
    assert job("upscale", str(hostile), str(out), "--model", model, "--if-exists", "skip", "--repair") == 3
    assert f"2 to do, {len(rows) - 2} done before" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*.png")} == contents
    assert job("upscale", str(hostile), str(out), "--verify") == 3
    assert "0 outputs differ" in capsys.readouterr().out


def test_bulk_output_equals_the_library(hostile: Path, trained: Path, work: Path) -> None:
    """The job adds nothing to the picture: same model and seed by hand, same bytes."""
    from resshift import seeds

    up = Upscaler.from_pretrained(trained / "model", device="cpu")
    picture = images.decode((hostile / "sub/fine.jpg").read_bytes())
    expected = images.encode(up.upscale(picture, Sampling(seed=seeds.derive(0, "picture", "sub/fine.jpg"))))
    found = (work / "upscaled" / "sub/fine_x4.png").read_bytes()
    assert found == expected  # although the processes may have different numbers of threads


def test_bucket_to_bucket(trained: Path, bucket: str, job: Job) -> None:
    for i in range(3):
        storage.write_bytes(f"{bucket}/in/day {i}/{i}.png", encoded(photo(i)))
    storage.write_bytes(f"{bucket}/in/notes.txt", b"not a picture")
    assert job("upscale", f"{bucket}/in", f"{bucket}/out", "--model", str(trained / "model")) == 0
    rows = {row["key"]: row["status"] for row in ledger.read(f"{bucket}/out").to_pylist()}
    assert rows == {"day 0/0.png": "ok", "day 1/1.png": "ok", "day 2/2.png": "ok", "notes.txt": "skipped"}
    header = images.probe(storage.read_bytes(f"{bucket}/out/day 1/1_x4.png"))
    assert (header.width, header.height) == (320, 288)
    assert job("upscale", f"{bucket}/in", f"{bucket}/out", "--verify") == 0


def test_evaluation_measures_against_the_truth(
    trained: Path, work: Path, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.evaluation.evaluate import bicubic_resized

    for i in range(3):
        truth = photo(50 + i, 64, 64)
        for folder, picture in (("gt", truth), ("lq", bicubic_resized(truth, 0.25))):
            (work / "eval" / folder).mkdir(parents=True, exist_ok=True)
            (work / "eval" / folder / f"{i}.png").write_bytes(encoded(picture))
    data = f"{work / 'eval' / 'lq'}:{work / 'eval' / 'gt'}"
    common = ("--model", str(trained / "model"))
    assert (
        job("evaluate", *common, "--data", f"toy={data}", "--out", str(work / "report"), "--replicas", "2")
        == 0
    )
    summary = json.loads((work / "report" / "summary.json").read_text())
    found = summary["sets"]["toy"]
    assert found["pictures"] == 3
    assert 15 < found["means"]["bicubic"]["psnr_y"]["mean"] < 60
    assert found["difference"]["psnr_y"]["high"] < 0  # twelve steps do not teach a model to see
    lines = (work / "report" / "report.csv").read_text().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(
        "set,key,status,reason,width,height,seconds,psnr_y_bicubic,psnr_y_against,psnr_y_ours"
    )
    assert (work / "report" / "report.html").read_text().count("<section") >= 3
    assert "PSNR-Y" in capsys.readouterr().out

    # One replica; and two parts that are merged: the same report to the byte.
    assert (
        job("evaluate", *common, "--data", f"toy={data}", "--out", str(work / "one"), "--replicas", "1") == 0
    )
    for i, names in enumerate((("0",), ("1", "2"))):
        for folder in ("gt", "lq"):
            (work / f"part{i}" / folder).mkdir(parents=True)
            for name in names:
                shutil.copy(work / "eval" / folder / f"{name}.png", work / f"part{i}" / folder)
        part = f"toy={work / f'part{i}' / 'lq'}:{work / f'part{i}' / 'gt'}"
        assert job("evaluate", *common, "--data", part, "--out", str(work / f"report{i}")) == 0
    assert (
        job(
            "evaluate", "--merge", str(work / "report1"), str(work / "report0"), "--out", str(work / "merged")
        )
        == 0
    )
    for other in ("one", "merged"):
        assert (work / other / "summary.json").read_bytes() == (work / "report" / "summary.json").read_bytes()

    assert (
        job(
            "evaluate",
            *common,
            "--against",
            str(trained / "model"),
            "--data",
            data,
            "--out",
            str(work / "same"),
        )
        == 0
    )
    same = json.loads((work / "same" / "summary.json").read_text())
    assert same["sets"]["lq"]["difference"]["psnr_y"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert job("evaluate", "--merge", str(work / "same"), str(work / "one"), "--out", str(work / "x")) == 2
    assert "differ in against, names" in capsys.readouterr().err
