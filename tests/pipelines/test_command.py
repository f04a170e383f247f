"""What all commands share."""

from __future__ import annotations

import argparse
import os

import pytest
from ray.exceptions import AuthenticationError

from pipelines.cluster.ray_internals import NO_CLUSTER_BY_ITSELF, SKIPPED_LINES
from pipelines.command import Exit, UsageError, connect_to_ray, min_max, positive, run, share


@pytest.mark.parametrize(
    ("text", "expected"), [("1", (1, 1)), ("4", (4, 4)), ("2:8", (2, 8)), ("3:3", (3, 3))]
)
def test_a_range_is_a_number_or_two(text: str, expected: tuple[int, int]) -> None:
    assert min_max("--workers", text) == expected


@pytest.mark.parametrize("text", ["0", "4:2", "0:2", "-1", "two", "1:2:3", "", "1:", ":2", "1 : 2", "\u0663"])
def test_another_range_is_refused_with_the_name_of_its_flag(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--workers must be N or MIN:MAX with 1 <= MIN <= MAX, got"):
        min_max("--workers", text)


def test_a_range_may_begin_at_zero_and_not_end_there() -> None:
    assert min_max("--replicas", "0:2", least=0) == (0, 2)
    with pytest.raises(UsageError, match="0 <= MIN <= MAX and 1 <= MAX, got '0'"):
        min_max("--replicas", "0", least=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.1%", 0.001), ("0%", 0.0), ("100%", 1.0), ("101%", None), ("0.1", None), ("-1%", None)],
)
def test_shares_are_per_cent(text: str, expected: float | None) -> None:
    if expected is None:
        with pytest.raises(argparse.ArgumentTypeError, match=f"percentage such as 0.1%, got '{text}'"):
            share(text)
    else:
        assert share(text) == pytest.approx(expected)


def test_a_number_is_at_least_one() -> None:
    assert positive("3") == 3
    for text in ("0", "-1", "2.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=f"at least 1, got '{text}'"):
            positive(text)


@pytest.mark.parametrize("given", [None, "what the user has set"])
def test_ray_has_its_variables_before_a_command_runs(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = SKIPPED_LINES | NO_CLUSTER_BY_ITSELF
    for name in variables:
        monkeypatch.setenv(name, given or "")
        if given is None:
            monkeypatch.delenv(name)
    seen: list[dict[str, str | None]] = []

    def command(_: argparse.Namespace) -> Exit:
        seen.append({name: os.environ.get(name) for name in variables})
        return Exit.COMPLETE

    assert run(command, argparse.ArgumentParser(), []) == 0
    assert seen == [{name: given or value for name, value in variables.items()}]


@pytest.mark.parametrize(
    ("address", "error", "told"),
    [
        ("192.0.2.1:6379", ConnectionError("no GCS\nmore"), "answers at RAY_ADDRESS=192.0.2.1:6379: no GCS"),
        ("192.0.2.1:6379", AuthenticationError("no token was found"), "6379: no token was found. "),
        ("", Exception("The current node timed out during startup. This could"), "Ray did not start within"),
    ],
)
def test_a_cluster_that_does_not_start_is_told_in_one_line(
    address: str,
    error: Exception,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray

    def init(**_: object) -> None:
        raise error

    def command(_: argparse.Namespace) -> Exit:
        connect_to_ray()
        return Exit.COMPLETE

    monkeypatch.setattr("pipelines.command.wait_passively", lambda: None)  # sets variables of this process
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert run(command, argparse.ArgumentParser(), []) == Exit.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_a_local_cluster_that_was_late_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    errors = [Exception("The current node timed out during startup. This could")]

    def init(**_: object) -> None:
        if errors:
            raise errors.pop()

    monkeypatch.setattr("pipelines.command.wait_passively", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect_to_ray()
    assert not errors
