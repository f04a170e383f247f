"""Publication of checkpoints: whole or not at all, on a local disk and on S3; what stays and what goes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training import checkpoints
from pipelines.training.checkpoints import (
    CheckpointWriter,
    Keeping,
    PartsOfAll,
    clear,
    fetch_latest,
    read_best,
    stored,
    uri_of,
    write_best,
)
from resshift import storage
from resshift.models import WeightsError
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.presets import test_x4 as toy_preset
from resshift.storage import StorageError, StorageReason
from resshift.training import checkpoint
from resshift.training.checkpoint import Snapshot
from resshift.training.losses import Objective
from resshift.training.parts import Held, Parts, Place
from resshift.training.step import DiffusionLearner, build_network

CONFIG = toy_preset()
PARTS = ["part-00000-of-00002.safetensors", "part-00001-of-00002.safetensors"]


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    learner = DiffusionLearner(
        CONFIG, build_network(CONFIG), Objective(CONFIG.model, CONFIG.loss, PixelUnshuffle(4))
    )
    return checkpoint.take(learner.state)


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("bucket") + "/run"


def publish(snapshot: Snapshot, out: str, step: int, scratch: Path) -> None:
    manifest = checkpoint.write(
        scratch / f"{step}", Snapshot(step, snapshot.weights, snapshot.rest | {"step": step}), CONFIG
    )
    checkpoints.publish(scratch / f"{step}", out, manifest)


def test_newest_complete_one_is_found(out: str, snapshot: Snapshot, tmp_path: Path) -> None:
    assert fetch_latest(out, tmp_path / "none") is None
    for step in (5, 10):
        publish(snapshot, out, step, tmp_path)
    assert fetch_latest(out, tmp_path / "got") == 10
    assert json.loads((tmp_path / "got" / "run.json").read_text())["step"] == 10
    assert [(found.step, found.complete) for found in stored(out)] == [(10, True), (5, True)]


@pytest.mark.slow
@pytest.mark.parametrize("written", range(6))
def test_upload_that_dies_after_any_file_is_never_the_latest(
    written: int, out: str, snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(snapshot, out, 5, tmp_path)
    calls = 0
    write = storage.write_file

    def dying(uri: str, source: str) -> None:
        nonlocal calls
        if calls == written:
            raise KeyboardInterrupt
        calls += 1
        write(uri, source)

    monkeypatch.setattr(storage, "write_file", dying)
    with pytest.raises(KeyboardInterrupt):
        publish(snapshot, out, 10, tmp_path)
    monkeypatch.undo()
    assert fetch_latest(out, tmp_path / "got") == 5
    clear(out, Keeping(3))
    assert [found.step for found in stored(out)] == [5]  # and nothing is left behind
    publish(snapshot, out, 10, tmp_path)
    assert fetch_latest(out, tmp_path / "got") == 10


def test_publishing_a_step_again_never_mixes_two_attempts(
    out: str, snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 10):
        publish(snapshot, out, step, tmp_path)
    write = storage.write_file

    def dying(uri: str, source: str) -> None:
        if uri.endswith("model.safetensors"):
            raise KeyboardInterrupt
        write(uri, source)

    monkeypatch.setattr(storage, "write_file", dying)
    with pytest.raises(KeyboardInterrupt):
        publish(snapshot, out, 10, tmp_path)
    monkeypatch.undo()
    assert fetch_latest(out, tmp_path / "got") == 5


@pytest.mark.parametrize("name", ["state.pt", "ema.safetensors", "files.json", "run.json"])
def test_damaged_one_is_passed_over(name: str, out: str, snapshot: Snapshot, tmp_path: Path) -> None:
    for step in (5, 10):
        publish(snapshot, out, step, tmp_path)
    storage.write_bytes(uri_of(out, 10, name), b"{}")
    assert fetch_latest(out, tmp_path / "got") == 5


def test_deleted_file_is_noticed(out: str, snapshot: Snapshot, tmp_path: Path) -> None:
    for step in (5, 10):
        publish(snapshot, out, step, tmp_path)
    storage.remove(uri_of(out, 10, "state.pt"))
    assert fetch_latest(out, tmp_path / "got") == 5


def test_run_does_not_begin_again_when_every_checkpoint_is_damaged(
    out: str, snapshot: Snapshot, tmp_path: Path
) -> None:
    publish(snapshot, out, 5, tmp_path)
    storage.write_bytes(uri_of(out, 5, "state.pt"), b"")
    with pytest.raises(
        WeightsError, match=r"no checkpoint of .* can be read: .*state\.pt is damaged.*Remove its step-\*"
    ):
        fetch_latest(out, tmp_path / "got")


def test_store_that_is_away_is_not_a_damaged_checkpoint(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on from an older one because of a network error would train the same steps twice."""
    out = str(tmp_path / "run")
    for step in (5, 10):
        publish(snapshot, out, step, tmp_path)
    read = storage.read_file

    def away(uri: str, target: str) -> None:
        if "step-00000010/state" in uri:
            raise StorageError(uri, StorageReason.UNAVAILABLE, "try later")
        read(uri, target)

    monkeypatch.setattr(storage, "read_file", away)
    with pytest.raises(StorageError, match="unavailable"):
        fetch_latest(out, tmp_path / "got")


@pytest.mark.parametrize(
    ("keeping", "best", "doomed"),
    [
        (Keeping(2), None, [8, 6, 4, 2]),
        (Keeping(2), 4, [8, 6, 2]),
        (Keeping(1), 12, [10, 8, 6, 4, 2]),
        (Keeping(2, milestone_every=4), None, [6, 2]),
        (Keeping(2, milestone_every=6), 2, [8, 4]),
        (Keeping(9), None, []),
    ],
)
def test_last_best_and_milestones_stay(keeping: Keeping, best: int | None, doomed: list[int]) -> None:
    assert keeping.doomed([2, 4, 6, 8, 10, 12], best) == doomed


def test_best_is_the_best(out: str) -> None:
    assert read_best(out) is None
    for step, value in ((5, 20.0), (10, 25.0), (15, 24.0)):
        write_best(out, step, "psnr_y", value, higher_is_better=True)
    assert read_best(out) == (10, 25.0)
    write_best(out, 10, "psnr_y", 23.0, higher_is_better=True)  # done again after a restart: what it is now
    assert read_best(out) == (10, 23.0)
    write_best(out, 20, "lpips", 0.3, higher_is_better=False)
    assert read_best(out) == (20, 0.3)


def test_writer_publishes_in_order_and_clears(out: str, snapshot: Snapshot, tmp_path: Path) -> None:
    order: list[Any] = []
    writer = CheckpointWriter(out, CONFIG, Keeping(2))
    for step in (5, 10, 15):
        taken = Snapshot(step, snapshot.weights, snapshot.rest | {"step": step})
        writer.submit(
            taken,
            before=[lambda step=step: order.append((step, [found.step for found in stored(out)]))],
            after=[lambda step=step: write_best(out, step, "psnr_y", -step, higher_is_better=True)],
        )
    writer.wait()
    assert [step for step, _ in order] == [5, 10, 15]
    assert order[-1] == (15, [10, 5])
    assert [found.step for found in stored(out)] == [15, 10, 5]  # the last two, and 5 as the best
    assert fetch_latest(out, tmp_path / "got") == 15


def test_failed_upload_is_raised_at_the_next_one(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(uri: str, source: str) -> None:
        raise StorageError(uri, StorageReason.DENIED, "no")

    monkeypatch.setattr(storage, "write_file", refuse)
    writer = CheckpointWriter(str(tmp_path / "run"), CONFIG, Keeping(2))
    writer.submit(snapshot)
    with pytest.raises(StorageError, match="denied"):
        writer.submit(snapshot)
    writer.wait()


def test_weights_are_read_back_as_they_were(out: str, snapshot: Snapshot, tmp_path: Path) -> None:
    publish(snapshot, out, 5, tmp_path)
    fetch_latest(out, tmp_path / "got")
    fresh = DiffusionLearner(
        CONFIG, build_network(CONFIG), Objective(CONFIG.model, CONFIG.loss, PixelUnshuffle(4))
    )
    checkpoint.load(tmp_path / "got", fresh.state, CONFIG)
    assert fresh.state.step == 5
    assert all(
        torch.equal(snapshot.weights["model"][key], value)
        for key, value in fresh.state.weights()["model"].items()
    )


def parts_of_two(snapshot: Snapshot, step: int) -> tuple[Snapshot, Snapshot]:
    """Return what two workers of a sharded run have to write."""
    rows = torch.arange(6.0).reshape(3, 2)
    one, two = ({"model/weight": Held(rows[a:b], a)} for a, b in ((0, 2), (2, 3)))
    rest = snapshot.rest | {"step": step}
    average = {"ema": snapshot.weights["ema"]}
    return Snapshot(step, average, rest, Place(0, 2, 0), one), Snapshot(step, {}, {}, Place(1, 2, 0), two)


def test_sharded_one_exists_when_the_parts_of_this_attempt_do(
    out: str, snapshot: Snapshot, tmp_path: Path
) -> None:
    """A killed attempt has left a part of the same step and its receipt."""
    first, second = parts_of_two(snapshot, 5)
    manifest = checkpoint.write(tmp_path / "second", second, CONFIG)
    checkpoints.publish_part(tmp_path / "second", out, manifest, "killed")
    leader = CheckpointWriter(out, CONFIG, Keeping(1), "this")
    leader.submit(first)
    lacking = uri_of(out, 5, "state.pt")
    while not storage.exists(lacking):
        time.sleep(0.01)
    assert fetch_latest(out, tmp_path / "early") is None
    other = CheckpointWriter(out, CONFIG, Keeping(1), "this")
    other.submit(second)
    other.wait()
    leader.wait()
    assert fetch_latest(out, tmp_path / "got") == 5  # verifies size and sha256 of all
    names = sorted(path.name for path in (tmp_path / "got").iterdir())
    assert names == sorted(["config.json", "ema.safetensors", "files.json", "run.json", "state.pt", *PARTS])
    (found,) = stored(out)
    assert sorted(found.names) == names  # no receipt is left
    whole = Parts(tmp_path / "got" / name for name in PARTS)
    assert torch.equal(whole.read("model/weight", torch.zeros(3, 2)), torch.arange(6.0).reshape(3, 2))


def test_part_that_does_not_come_is_named(out: str, snapshot: Snapshot, tmp_path: Path) -> None:
    manifest = checkpoint.write(tmp_path / "first", parts_of_two(snapshot, 5)[0], CONFIG)
    with pytest.raises(StorageError, match=rf"{PARTS[1]}.*not written within 0 s"):
        checkpoints.publish(tmp_path / "first", out, manifest, PartsOfAll(2, "this", 0.0))
    assert not any(found.complete for found in stored(out))


def test_clearing_leaves_the_parts_of_a_later_step(out: str, snapshot: Snapshot, tmp_path: Path) -> None:
    """Another worker may upload its part of the next step while the first one clears."""
    for step in (5, 10):
        publish(snapshot, out, step, tmp_path)
    manifest = checkpoint.write(tmp_path / "second", parts_of_two(snapshot, 15)[1], CONFIG)
    checkpoints.publish_part(tmp_path / "second", out, manifest, "this")
    clear(out, Keeping(1), up_to=10)
    assert [found.step for found in stored(out)] == [15, 10]
    clear(out, Keeping(1))
    assert [found.step for found in stored(out)] == [10]
