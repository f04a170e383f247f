"""The command `resshift`: what it prints, and one line with exit code 2 for bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from resshift import Upscaler
from resshift.command.main import main


def test_export_prints_the_comparison_and_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", "tiny-x4", "--to", "hf", "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "picture 1x3x16x16: largest difference 0 of 1"
    assert printed[1].startswith("step 1x48x16x16: largest difference 0 of ")
    assert [line.split(":")[0] for line in printed[2:]] == [
        str(out / name) for name in ("README.md", "config.json", "model.safetensors")
    ]
    assert Upscaler.from_pretrained(out, device="cpu").name == "tiny-x4"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["no-such-model", "--to", "hf"], "no model 'no-such-model': give one of "),
        (
            ["tiny-x4", "--to", "onnx", "--out", "hf://a/b"],
            "--out hf://OWNER/NAME needs --to hf, got",
        ),
        (
            ["tiny-x4", "--to", "hf", "--out", "hf://a"],
            "hf://OWNER/NAME names a repository of a hub, got 'hf://a'",
        ),
        (["tiny-x4", "--to", "hf", "--out", "."], "an export needs a new or empty directory, got ."),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1
