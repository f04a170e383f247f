"""`resshift SRC DST`: pictures on this machine, without Ray."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resshift import Upscaler, weights
from resshift.command.main import main
from resshift.config import Sampling
from resshift.images.animation import decode_frames
from resshift.presets import test_x4 as toy_preset
from resshift.training.step import build_network
from tests.pictures import decoded, encoded


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model") / "toy"
    weights.save_model(directory, "toy", toy_preset().model, build_network(toy_preset()))
    return str(directory)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(encoded(seed=ord(name[0]), height=9, width=8))
    (folder / "a.AAE").write_text("<plist>")
    return folder


def expected(data: bytes, model: str, **options: float) -> np.ndarray:
    picture = decode_frames(data).pictures[0]
    up = Upscaler.from_pretrained(model, device="cpu")
    return up.upscale(picture, Sampling(**options)).pixels  # type: ignore[arg-type]


def test_one_picture_is_what_the_upscaler_makes(
    photos: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = photos / "a.png", tmp_path / "big.png"
    assert main([str(source), str(target), "--model", model, "--seed", "3", "--steps", "2"]) == 0
    assert (decoded(target.read_bytes()) == expected(source.read_bytes(), model, seed=3, steps=2)).all()
    assert capsys.readouterr().out.startswith(f"{target}: 8x9 -> 32x36, ")


def test_the_name_decides_the_format_and_jpg_is_jpeg(photos: Path, model: str, tmp_path: Path) -> None:
    assert main([str(photos / "a.png"), str(tmp_path / "big.JPG"), "--model", model]) == 0
    assert Image.open(tmp_path / "big.JPG").format == "JPEG"
    told = [str(photos / "a.png"), f"{tmp_path}/out/", "--format", "jpg", "--outscale", "2", "--model", model]
    assert main(told) == 0
    with Image.open(tmp_path / "out" / "a_x2.jpg") as made:
        assert (made.format, made.size) == ("JPEG", (16, 18))


def test_pipes(
    photos: Path, model: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    data = (photos / "b.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["-", "-", "--model", model]) == 0
    assert (decoded(capfdbinary.readouterr().out) == expected(data, model)).all()


def test_a_folder_is_continued_and_failures_are_lines(
    photos: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "torn.png").write_bytes(encoded(seed=1)[:60])
    out = tmp_path / "out"
    assert main([str(photos), str(out), "--model", model]) == 3
    told = capsys.readouterr()
    assert told.out == f"2 made in {out}, 1 failed, 1 other files left out\n"
    (failed,) = [line for line in told.err.splitlines() if line.startswith("failed: ")]
    assert failed.startswith(f"failed: {photos}/torn.png: ")
    (photos / "torn.png").unlink()
    before = (out / "a_x4.png").stat().st_mtime_ns
    (out / "b_x4.png").unlink()
    assert main([str(photos), str(out), "--model", model]) == 0
    told = capsys.readouterr().out
    assert told == f"1 made in {out}, 1 were there (--overwrite makes them again), 1 other files left out\n"
    assert (out / "a_x4.png").stat().st_mtime_ns == before
    assert sorted(path.name for path in out.iterdir()) == ["a_x4.png", "b_x4.png"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["a.png", "big"], "DST big has no extension of a format: give one of .png, .jpg"),
        (["a.png", "a.png"], "DST a.png is SRC: the original would be lost"),
        ([".", "./out"], "DST must not lie inside ., got ./out"),
        ([".", "-"], "DST - takes one picture, got ."),
        (["-", "a.png", "out"], "- is one picture: it cannot be given beside a.png"),
        (["a.png", "b.jpg", "--fidelity", "0.5"], "--fidelity must be 0 for toy, which has no regression"),
        (["a.png", "b.jpg", "--quality", "0"], "--quality must lie in 1 to 100, got 0"),
        (["a.png", "b.jpg", "--max-megapixels", "0"], "--max-megapixels must be positive"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str],
    line: str,
    photos: Path,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photos)
    before = sorted(photos.rglob("*"))
    assert main([*arguments, "--model", model]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1
    assert sorted(photos.rglob("*")) == before


def test_a_picture_above_the_limit_is_told(
    photos: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--max-megapixels", "0.00001", "--model", model]
    assert main([str(photos / "a.png"), str(tmp_path / "big.png"), *told]) == 3
    expected_line = (
        f"failed: {photos}/a.png: too_large: the picture is 8x9 = 72 pixels, at most 10 are allowed\n"
    )
    assert capsys.readouterr().err == expected_line


def test_progress_is_told_after_every_tile_and_ends_at_one(model: str) -> None:
    """The toy has 4 steps on unshuffled pixels: its tiles are those of the plan, 4 times."""
    up = Upscaler.from_pretrained(model, device="cpu")
    photo = np.random.default_rng(0).integers(0, 256, (70, 40, 3), np.uint8)
    shares: list[float] = []
    up(photo, tile_px=32, progress=shares.append)
    total = up.config.steps * up.plan(70, 40, Sampling(tile_px=32)).num_tiles
    assert shares == [(i + 1) / total for i in range(total)]


@pytest.mark.slow
def test_the_command_needs_no_ray(photos: Path, model: str, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"  # an import of it would raise
        "from resshift.command.main import main; sys.exit(main(['models']) or main(sys.argv[1:]))"
    )
    arguments = [str(photos / "a.png"), str(tmp_path / "big.png"), "--model", model]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "big.png").exists()


def test_models_and_doctor_tell_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    told = capsys.readouterr().out
    assert "  tiny-x4                   x4, 1 steps\n" in told
    assert "https://github.com/zsyOAOA/ResShift:\n" in told
    assert main(["doctor"]) == 0
    assert "ok    weights: tiny-inpaint, tiny-x4, tiny-x4-s4\n" in capsys.readouterr().out
