"""Every reason of a picture has a kind, and a problem survives the trip from another process."""

from __future__ import annotations

import json
import pickle

import pytest

from resshift.images import ImageReason
from serve.http.problems import KINDS, MEDIA_TYPE, Problem, picture_problem


@pytest.mark.parametrize(
    "reason", [*ImageReason, "timeout", "killed_worker", "out_of_memory", "upscale_error"]
)
def test_every_reason_has_a_kind(reason: str) -> None:
    problem = picture_problem(reason, "why")
    assert 400 <= problem.status <= 500
    assert json.loads(bytes(problem.response().body))["reason"] == reason


def test_a_problem_has_the_members_of_rfc_9457() -> None:
    answer = Problem("busy", "3 requests wait already", retry_after_s=1.2, members={"waiting": 3}).response()
    assert (answer.status_code, answer.headers["retry-after"], answer.headers["content-type"]) == (
        503,
        "2",
        MEDIA_TYPE,
    )
    assert json.loads(bytes(answer.body)) == {
        "type": "/problems/busy",
        "title": "There is more work than can be done in time",
        "status": 503,
        "detail": "3 requests wait already",
        "waiting": 3,
    }


def test_a_problem_can_be_pickled() -> None:
    problem = pickle.loads(pickle.dumps(Problem("rate_limited", "slower", retry_after_s=3, members={"a": 1})))
    assert (problem.kind, problem.detail, problem.retry_after_s, problem.members) == (
        "rate_limited",
        "slower",
        3,
        {"a": 1},
    )


def test_statuses_are_errors() -> None:
    assert all(400 <= kind.status < 600 and kind.title for kind in KINDS.values())
