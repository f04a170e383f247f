"""Training on a real Ray cluster that loses its workers. More faults, and longer runs:
tests/chaos/faults.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle

from pipelines.training import trainer
from pipelines.training.trainer import Workers, run_training
from resshift import storage
from resshift.config import ConfigError
from resshift.training.step import TrainingDiverged
from tests.scripts import load_script

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow]


faults = load_script("tests/chaos/faults.py")
ray.cloudpickle.register_pickle_by_value(faults)  # workers cannot import it


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> str:
    return faults.make_shards(tmp_path_factory.mktemp("faults"))


def test_killed_worker_leaves_no_trace_in_the_run(data: str, tmp_path: Path) -> None:
    """Killed before step 12 of 16, checkpoints every 8: weights, average, moments and log are bitwise those
    of the run without a kill. Both degrade on their device.
    """
    config = faults.toy("train.steps=16", "data.degrade_on=device")
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    faults.train(config, data, whole)
    faults.train(config, data, cut, worker=faults.dying(str(tmp_path / "marker"), 11))
    assert (tmp_path / "marker.hurt").exists()
    faults.check_killed(whole, cut, 16, tolerance=0.0)
    faults.check_samples(cut, 16, 8, 50)


def test_killed_worker_of_several_and_another_number_after(data: str, tmp_path: Path, bucket: str) -> None:
    """Two workers, one killed before step 6; then three workers, which cannot share eight evenly, finish; no
    sample twice or missed.
    """
    out = str(tmp_path / "run")
    faults.train(
        faults.toy("train.steps=8", "train.checkpoint_every=4"),
        data,
        out,
        (2, 2),
        faults.dying(str(tmp_path / "marker"), 5, rank=1),
    )
    assert (tmp_path / "marker.hurt").exists()
    faults.train(faults.toy("train.steps=12", "train.checkpoint_every=4"), data, out, (3, 3))
    faults.check_samples(out, 12, 8, 50)
    assert list(faults.losses(out)) == list(range(1, 13))
    assert faults.worker_counts(out) == [2, 3]


def test_what_another_attempt_would_repeat_ends_the_run(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is never finite: the steps are skipped, their pictures listed, and the run stops without
    being restarted.
    """

    def broken(settings: dict[str, str]) -> dict[str, Any]:
        from pipelines.training import worker
        from resshift.training.losses import LossTerms, Objective

        def nothing(self: Any, network: Any, *_: Any) -> LossTerms:
            loss = next(network.parameters()).sum() * float("nan")
            return LossTerms(loss, loss.detach(), loss.detach(), loss.detach())

        patched: Any = Objective
        original, patched.__call__ = patched.__call__, nothing
        try:
            return worker.train_worker(settings)
        finally:
            patched.__call__ = original

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(trainer, "train_worker", broken)
    out = str(tmp_path / "run")
    config = faults.toy("train.log_every=3", "train.max_skipped_steps=3", "train.steps=30")
    with pytest.raises(
        TrainingDiverged, match=r"3 steps in a row, last at step 2; the pictures are listed in .*run/skipped"
    ):
        run_training(config, data, out, Workers(cpus=0.5))
    (entry,) = storage.list_entries(f"{out}/skipped")
    lines = [json.loads(line) for line in storage.read_bytes(entry.uri).decode().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(len(line["keys"]) == 8 for line in lines)


def test_more_workers_than_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"train.batch_size \(8\) must be at least the number of workers \(9\)"
    ):
        run_training(faults.toy(), "nowhere", str(tmp_path / "run"), Workers(least=1, most=9))
