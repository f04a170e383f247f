"""What training refuses in one line before Ray starts."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

from pipelines.command import UsageError
from pipelines.shards import parquet
from pipelines.training import command
from resshift.presets import preset


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
def test_data_without_a_picture_is_refused(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [SimpleNamespace(num_ok=count) for count in counts]
    monkeypatch.setattr(parquet, "read_manifest", lambda root: shards)
    monkeypatch.setattr(command, "connect_to_ray", lambda **_: pytest.fail("Ray was started"))
    flags = ["--preset", "tiny-x4", "--data", "shards/", "--out", "run"]
    options = command.add_arguments(argparse.ArgumentParser(), "tiny-x4").parse_args(flags)
    with pytest.raises(UsageError, match=r"^shards/ holds no usable picture: shards/status.parquet says why"):
        command.train_from(options, preset("tiny-x4"))
