"""One run at a time at a destination, and a run that was killed keeps nobody out."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.ledger import lease
from pipelines.ledger.lease import Lease, Occupied, held
from resshift import storage

BEAT_S = 0.1


@pytest.fixture(params=["folder", "bucket"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "folder" else f"{request.getfixturevalue('bucket')}/out"


def files(target: str) -> list[str]:
    """Return the names of the runs that say they are there; a folder goes with its last file."""
    root = storage.join(target, "_resshift/working")
    return (
        [entry.key for entry in storage.list_entries(root)]
        if storage.is_s3(root) or Path(root).exists()
        else []
    )


def left_behind(target: str, **changes: Any) -> str:
    """Leave the file of a run that was killed on another machine."""
    beat = {"host": "elsewhere", "pid": 1, "place": "elsewhere", "beats": 7, "is_working": True} | changes
    uri = storage.join(target, "_resshift/working/20200101T000000-abcdef.json")
    storage.write_bytes(uri, json.dumps(beat).encode())
    return uri


def test_a_run_says_that_it_is_there_while_it_is(target: str) -> None:
    one = Lease(target, beat_s=BEAT_S)
    one.take()
    (name,) = files(target)
    uri = storage.join(target, f"_resshift/working/{name}")
    first = json.loads(storage.read_bytes(uri))["beats"]
    deadline = time.monotonic() + 30
    while json.loads(storage.read_bytes(uri))["beats"] == first:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    one.release()
    assert files(target) == []


def test_a_second_run_is_refused_and_the_first_goes_on(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", BEAT_S)
    with held(target):
        (name,) = files(target)
        with pytest.raises(
            Occupied,
            match=r"another run works at .*out \(host .*, process \d+, since \d{8}T\d{6} UTC\): wait until",
        ):
            Lease(target).take()
        assert files(target) == [name]
    with held(target):
        pass


def test_a_run_that_was_killed_elsewhere_is_watched_and_then_removed(target: str) -> None:
    left_behind(target)
    one = Lease(target, beat_s=BEAT_S)
    one.take()
    assert len(files(target)) == 1
    one.release()
    assert files(target) == []


def test_a_run_that_is_stopped_while_it_watches_leaves_nothing(tmp_path: Path) -> None:
    left_behind(str(tmp_path))
    one = Lease(str(tmp_path), beat_s=1)
    taking = threading.Thread(target=one.take)
    taking.start()
    while len(files(str(tmp_path))) < 2:
        time.sleep(0.01)
    one.release()
    taking.join()
    assert files(str(tmp_path)) in ([], ["20200101T000000-abcdef.json"])


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "_resshift" / "working" / "notes.txt"), b"of somebody")
    with held(str(tmp_path)):
        pass
    assert files(str(tmp_path)) == ["notes.txt"]


def test_a_process_that_is_gone_from_this_machine_is_not_waited_for(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left_behind(target, pid=ended.pid, place=lease.place())
    monkeypatch.setattr(lease, "BEAT_S", 3600)  # whoever waits, waits for ever
    with held(target):
        assert len(files(target)) == 1


def test_of_runs_that_begin_together_one_stays(tmp_path: Path) -> None:
    ready = threading.Barrier(3)
    outcomes: list[Lease | Occupied] = []

    def begin() -> None:
        one = Lease(str(tmp_path), beat_s=BEAT_S)
        ready.wait()
        try:
            one.take()
            outcomes.append(one)
        except Occupied as refused:
            outcomes.append(refused)

    threads = [threading.Thread(target=begin) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (stayed,) = (one for one in outcomes if isinstance(one, Lease))
    assert len(files(str(tmp_path))) == 1
    stayed.release()


def test_a_run_whose_clock_is_behind_does_not_push_out_one_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = Lease(str(tmp_path), beat_s=BEAT_S)
    working.take()
    monkeypatch.setattr(time, "strftime", lambda *_: "20000101T000000")
    with pytest.raises(Occupied):
        Lease(str(tmp_path), beat_s=BEAT_S).take()
    working.release()


def test_a_bulk_job_that_would_be_the_second_is_one_line(
    tmp_path: Path,
    job: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", BEAT_S)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"never read")
    with held(str(tmp_path / "out")):
        assert job("upscale", str(tmp_path / "in"), str(tmp_path / "out"), "--model", "nearest-x4") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: another run works at ")
    assert not (tmp_path / "out" / "_resshift" / "job.json").exists()
