"""The command line is a contract: flags, exit codes, one clear line for every kind of bad input, nothing
written when nothing was done.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pipelines.bulk import probe
from pipelines.ledger import ledger
from tests.scripts import load_script

ROOT = Path(__file__).parents[2]
Job = Callable[..., int]

TRAIN = {
    *(
        "--help",
        "--preset",
        "--data",
        "--out",
        "--set",
        "--workers",
        "--gpus-per-worker",
        "--init",
        "--val",
        "--export",
        "--dry-run",
    ),
}
FLAGS = {
    "prepare": {"--help", "--min-side", "--short-side", "--shard-mb", "--dry-run"},
    "train": TRAIN,
    "distill": TRAIN | {"--teacher"},
    "teach": {"--help", "--preset", "--teacher", "--set", "--passes", "--keep-bicubic", "--dry-run"},
    "train_autoencoder": TRAIN | {"--report"},
    "upscale": {
        *(
            "--help",
            "--model",
            "--preset",
            "--first-stage",
            "--outscale",
            "--cascade",
            "--steps",
            "--sampler",
            "--fidelity",
            "--format",
            "--quality",
            "--name",
            "--seed",
            "--tile",
            "--max-megapixels",
            "--replicas",
        ),
        *("--plan", "--dry-run", "--status", "--retry-failed", "--verify", "--repair", "--set"),
        *("--include", "--exclude", "--keys", "--masks", "--if-exists", "--price-per-hour"),
        *("--drivers", "--tolerate", "--faces"),
        "--engine",  # of earlier versions: refused with what to do
    },
    "evaluate": {
        *(
            "--help",
            "--model",
            "--preset",
            "--first-stage",
            "--data",
            "--out",
            "--seed",
            "--tile",
            "--border",
            "--lpips-net",
            "--lpips-trunk",
            "--replicas",
            "--dry-run",
        ),
        *("--against", "--merge", "--protocol", "--steps", "--sampler", "--fidelity", "--niqe", "--iqa"),
    },
    "demo": {"--help", "--out", "--model", "--lpips-trunk"},
    "doctor": {"--help", "--read", "--nodes", "--lock", "--set"},
    "preview": {"--help", "--preset", "--set", "--num"},
    "testset": {"--help", "--protocol", "--recipe", "--num", "--seed", "--dry-run"},
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_frozen(name: str) -> None:
    """A new knob belongs in a configuration, for `--set`; a flag is a promise."""
    actions = load_script(f"jobs/{name}.py").arguments()._actions
    assert {flag for action in actions for flag in action.option_strings if flag.startswith("--")} == FLAGS[
        name
    ]


@pytest.mark.parametrize("engine", ["serve", "actors"])
def test_an_engine_that_an_old_command_names_is_refused_with_what_to_do(
    engine: str, job: Job, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("upscale", str(photos), str(tmp_path / "out"), "--engine", engine) == 2
    told = "error: --engine is gone, every job runs on Ray Serve: give the same command without it\n"
    assert capsys.readouterr().err == told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FLAGS)
def test_every_job_is_listed_and_short(name: str) -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(FLAGS)
    assert len((ROOT / "jobs" / f"{name}.py").read_text().splitlines()) <= 200


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_help_shows_examples_and_exit_codes(name: str) -> None:
    shown = subprocess.run(
        [sys.executable, f"jobs/{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert f"python jobs/{name}.py" in shown
    assert "Exit codes: 0 complete" in shown


@pytest.mark.parametrize("name", FLAGS)
def test_unknown_flag_is_usage(name: str) -> None:
    with pytest.raises(SystemExit) as stop:
        load_script(f"jobs/{name}.py").main(["--no-such-flag"])
    assert stop.value.code == 2


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The manifest of sixteen pictures, enough for what is checked before training."""
    from pipelines.shards.parquet import ShardSummary, write_manifest

    write_manifest(
        str(tmp_path / "shards"), "nowhere", [ShardSummary("a.parquet", "f", ((16, 16),), 1, {"": 16})]
    )
    return tmp_path / "shards"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "realsr-x5"], "unknown preset 'realsr-x5'; allowed: realsr-x4-s15"),
        (
            ["--set", "train.stepz=5"],
            "unknown setting 'train.stepz'; allowed here: activation_checkpointing, batch_size",
        ),
        (["--set", "trian.steps=5"], "there is no section 'trian'; allowed: data"),
        (["--set", "train.steps=many"], "train.steps: Input should be a valid integer"),
        (["--set", "train.steps"], "a setting looks like section.field=value"),
        (["--set", "data.crop_px=33"], "data.crop_px must be a multiple of 32"),
        (["--set", "train.batch_size=0"], "train.batch_size must be at least 1, got 0"),
    ],
)
def test_bad_configuration_is_one_line(
    arguments: list[str],
    message: str,
    job: Job,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = job(
        "train", "--preset", "test-x4", "--data", str(shards), "--out", str(tmp_path / "run"), *arguments
    )
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("question", ["--status", "--verify"])
def test_a_place_without_a_job_is_not_in_order(
    question: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped DST would have nothing missing."""
    assert job("upscale", str(tmp_path / "in"), str(tmp_path / "out"), question) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path / 'out'} holds no job: nothing has been upscaled into it\n"
    )


@pytest.mark.parametrize(
    ("tolerated", "code"), [([], 3), (["--tolerate", "0.4%"], 3), (["--tolerate", "0.5%"], 0)]
)
def test_a_share_of_failed_inputs_is_tolerated(
    tolerated: list[str], code: int, job: Job, tmp_path: Path
) -> None:
    """One of two hundred."""
    rows = [ledger.row(str(i), "e", "failed" if i == 7 else "ok") for i in range(200)]
    ledger.begin_job(str(tmp_path / "out"), {"scale": 4})
    ledger.append(str(tmp_path / "out"), rows)
    asked = ["--status", *tolerated]
    assert job("upscale", str(tmp_path / "in"), str(tmp_path / "out"), *asked) == code


def test_training_without_shards_is_said(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("train", "--preset", "test-x4", "--data", str(tmp_path), "--out", str(tmp_path / "run")) == 1
    assert (
        "manifest.json: missing: no shards here; photos become shards with python jobs/prepare.py"
        in capsys.readouterr().err
    )


def test_dry_run_of_training_prints_the_configuration(
    job: Job, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", str(shards), "--out", str(tmp_path / "run"), "--set", "train.steps=7", "--dry-run")
    assert job("train", "--preset", "test-x4", *arguments) == 0
    assert '"steps": 7' in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_dry_run_needs_no_shards_and_training_does(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("train", "--preset", "test-x4", "--set", "train.steps=7", "--dry-run") == 0
    assert capsys.readouterr().out.startswith("no --data, 7 steps of 8\n")
    assert job("train", "--preset", "test-x4", "--out", "nowhere") == 2
    assert capsys.readouterr().err == "error: --data is required to train\n"
    assert not Path("nowhere").exists()


def test_help_lists_settings_with_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    for name, setting in (("train", "optim.betas=0.9,0.99"), ("upscale", "output.frames=first")):
        with pytest.raises(SystemExit):
            load_script(f"jobs/{name}.py").main(["--help"])
        assert f"\n{setting}    (" in capsys.readouterr().out


def test_a_wrong_val_is_told_before_workers_start(
    job: Job, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--data",
        str(shards),
        "--out",
        str(tmp_path / "run"),
        "--val",
        f"{tmp_path}/lq:{tmp_path}/gt",
    )
    assert job("train", "--preset", "test-x4", *arguments) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/lq: missing: no such file or bucket\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny-x5"], "no model 'tiny-x5': give one of"),
        (["--replicas", "two"], "--replicas must be N or MIN:MAX"),
        (["--steps", "5"], "--steps must lie in 1 to 4 for "),
        (["--model", "nearest-x4", "--outscale", "2"], "--outscale must be 4 for nearest-x4, got 2"),
        (["--replicas", "0"], "1 <= MIN <= MAX"),
        (["--replicas", "3:1"], "1 <= MIN <= MAX"),
        (["--outscale", "0"], "--outscale must be a number in (0, 16]"),
        (["--quality", "101"], "--quality must lie in 1 to 100"),
        (["--tile", "7"], "--tile must be at least"),
        (["--max-megapixels", "0"], "--max-megapixels must be positive"),
        (["--name", "{stem}_{when}.png"], "allowed: {dir}, {name}, {stem}, {ext}, {scale}"),
        (["--price-per-hour", "-1"], "--price-per-hour must be at least 0"),
        (["--keys", "no/such/list"], "--keys no/such/list: No such file"),
        (["--include", "*.tif"], "that are selected"),
        (["--set", "target.see=AES256"], "unknown setting"),
        (["--set", "target.sse=rot13"], "target.sse: Input should be"),
        (["--set", "limits.seconds=0"], "limits.seconds must be positive"),
        (["--set", "output.frames=last"], "output.frames: Input should be"),
    ],
)
def test_bad_upscale_options_are_one_line(
    arguments: list[str],
    message: str,
    job: Job,
    photos: Path,
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = [] if "--model" in arguments else ["--model", str(toy_model)]
    code = job("upscale", str(photos), str(tmp_path / "out"), *model, *arguments)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_one_picture_into_a_name_is_a_picture(
    job: Job, photos: Path, toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no folder of that name: `resshift` makes it, without Ray."""
    big = tmp_path / "big.jpg"
    assert job("upscale", str(photos / "a.png"), str(big), "--model", str(toy_model), "--outscale", "2") == 0
    assert capsys.readouterr().out.startswith(f"{big}: 64x64 -> 128x128, ")
    assert Image.open(big).size == (128, 128)


@pytest.mark.parametrize("target", ["", "inner", "inner/../deep"])
def test_target_inside_source_is_refused(
    target: str, job: Job, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("upscale", "prepare"):
        assert job(name, str(photos), str(photos / target)) == 2
        assert "error: DST must not lie inside " in capsys.readouterr().err


def test_empty_source_is_said(
    job: Job, toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert job("upscale", str(tmp_path / "empty"), str(tmp_path / "out"), "--model", str(toy_model)) == 2
    assert "no files under" in capsys.readouterr().err
    assert job("upscale", str(tmp_path / "absent"), str(tmp_path / "out"), "--model", str(toy_model)) == 1
    assert "missing" in capsys.readouterr().err


def test_plan_writes_nothing_and_names_collisions(
    job: Job,
    photos: Path,
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "replica_speed", lambda *_: (0.5, "measured here"))
    (photos / "a.jpg").write_bytes((photos / "a.png").read_bytes())
    assert job("upscale", str(photos), str(tmp_path / "out"), "--model", str(toy_model), "--plan") == 0
    shown = capsys.readouterr().out
    assert "2 inputs" in shown
    assert "1 to do (0.0 MB), 0 done before, 1 left out" in shown
    assert "name_collision" in shown
    assert "at 0.5 MP/s each (measured here)" in shown
    assert not (tmp_path / "out").exists()


def test_evaluation_names_pictures_without_truth(
    job: Job, photos: Path, toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gt").mkdir()
    data = f"{photos}:{tmp_path / 'gt'}"
    assert job("evaluate", "--model", str(toy_model), "--data", data, "--out", str(tmp_path / "report")) == 2
    assert "1 pictures" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "set5"], "--protocol must be one of imagenet-test, realsr, bicubic-x4, got 'set5'"),
        (["--border", "-1"], "--border must not be negative and --replicas at least 1, got -1 and None"),
        (["--steps", "5"], "--steps must lie in 1 to 4 for toy, got 5"),
        (["--niqe", "absent.npz"], "no NIQE parameters at absent.npz"),
        (["--lpips-trunk", "absent.pth"], "no LPIPS trunk at absent.pth"),
        (["--merge", "report"], "--merge takes reports and cannot be combined with --model or --data"),
    ],
)
def test_evaluation_refuses_before_it_starts(
    job: Job,
    photos: Path,
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert (
        job(
            "evaluate",
            "--model",
            str(toy_model),
            "--data",
            str(photos),
            "--out",
            str(tmp_path / "report"),
            *arguments,
        )
        == 2
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from resshift.presets import test_x4
    from resshift.training.step import build_network
    from resshift.weights import save_model

    directory = tmp_path_factory.mktemp("toy")
    save_model(directory, "toy", test_x4().model, build_network(test_x4()))
    return directory
