"""Notices of a cloud reach `ray drain-node`; the metadata service is a server on loopback."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.cluster import notices
from pipelines.cluster.notices import Metadata, Notice, drain, watch
from tests.metadata_server import MetadataServer, metadata_server


@pytest.fixture
def service() -> Iterator[MetadataServer]:
    with metadata_server() as served:
        yield served


class Drained:
    """Stands in for Ray; refuses the first `refusals` times."""

    def __init__(self, refusals: int = 0) -> None:
        self.asked: list[Notice] = []
        self._refusals = refusals

    def __call__(self, notice: Notice) -> bool:
        self.asked.append(notice)
        return len(self.asked) > self._refusals


def steps(*events: Callable[[], object]) -> Callable[[float], None]:
    """Return a function for `sleep`: one event after each question; after the last, the test fails."""
    left = list(events)

    def sleep(_: float) -> None:
        assert left, "still watching"
        left.pop(0)()

    return sleep


def nothing() -> None:
    """Nothing happens."""


def test_an_interruption_notice_drains_the_node_until_the_time_that_it_names(service: MetadataServer) -> None:
    drained = Drained()
    watch(
        Metadata(service.url), drained, sleep=steps(nothing, nothing, lambda: service.interrupt(120), nothing)
    )
    (notice,) = drained.asked
    assert notice.until == pytest.approx(time.time() + 120, abs=10)
    assert notice.message.startswith("spot interruption: terminate at 20")
    assert service.given == 1, "a token lives for six hours"


def test_a_token_that_has_expired_is_renewed(service: MetadataServer) -> None:
    def expire() -> None:
        service.token = "token-2"

    drained = Drained()
    watch(Metadata(service.url), drained, sleep=steps(expire, lambda: service.interrupt(120)))
    assert len(drained.asked) == 1
    assert (service.given, service.refused) == (2, 1)


def test_ray_is_told_again_until_it_accepts(service: MetadataServer) -> None:
    service.interrupt(120)
    drained = Drained(refusals=3)
    watch(Metadata(service.url), drained, sleep=steps(nothing, nothing, nothing))
    assert len(drained.asked) == 4


@pytest.mark.parametrize(("drains", "expected"), [(True, ["rebalance", "spot"]), (False, ["spot"])])
def test_a_recommendation_drains_only_if_that_is_wanted_and_the_notice_still_counts(
    drains: bool, expected: list[str], service: MetadataServer
) -> None:
    service.recommend()
    drained = Drained()
    metadata = Metadata(service.url)
    watch(metadata, drained, rebalance=drains, sleep=steps(nothing, nothing, lambda: service.interrupt(120)))
    assert [notice.message.split()[0] for notice in drained.asked] == expected
    assert drained.asked[0].until is None or not drains


def test_a_service_that_is_away_is_asked_again(service: MetadataServer) -> None:
    class Away(Metadata):
        def interruption(self) -> Notice | None:
            if answers:
                raise answers.pop()
            return super().interruption()

    answers: list[Exception] = [TimeoutError("away"), ValueError("no JSON"), ConnectionError("refused")]
    service.interrupt(60)
    drained = Drained()
    watch(Away(service.url), drained, sleep=steps(nothing, nothing, nothing))
    assert len(drained.asked) == 1


def test_drain_uses_the_command_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, len(commands) - 1, "", "one line\nthe reason\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert drain(Notice("spot", time.time() + 100), ["--node-id", "ab"])
    assert not drain(Notice("rebalance", None)), "Ray has refused"
    assert commands[0][1:6] == ["-m", "ray.scripts.scripts", "drain-node", "--node-id", "ab"]
    assert commands[0][-2] == "--deadline-remaining-seconds"
    assert 98 <= int(commands[0][-1]) <= 100
    assert commands[1][4:] == ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "rebalance"]


def test_the_command_of_ray_has_these_options() -> None:
    """It is hidden from `ray --help`."""
    from ray.scripts.scripts import drain_node

    command: Any = drain_node
    names = {option for parameter in command.params for option in parameter.opts}
    wanted = {"--address", "--node-id", "--reason", "--reason-message", "--deadline-remaining-seconds"}
    assert wanted <= names
    (reason,) = [one for one in command.params if "--reason" in one.opts]
    assert "DRAIN_NODE_REASON_PREEMPTION" in reason.type.choices


def test_the_file_needs_nothing_of_the_project(tmp_path: Path) -> None:
    """On the nodes of cluster.yaml it lies alone."""
    copy = tmp_path / "notices.py"
    copy.write_text(Path(notices.__file__).read_text())
    program = f"import sys; sys.path = [p for p in sys.path if p]; sys.argv = ['{copy}', '--help']\n"
    program += f"import runpy; runpy.run_path('{copy}', run_name='__main__')"
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "--leave" in done.stdout
