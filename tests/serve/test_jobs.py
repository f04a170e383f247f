"""Pictures that are answered later: asked for once, kept through a new keeper, seen by their owner alone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.ledger import lease
from resshift import storage
from serve.http.keys import digest, new_key
from serve.http.options import PictureOptions
from tests.pictures import decoded, encoded, enlarged

LATER = {"Prefer": "respond-async"}


def ended(endpoint: Any, path: str, **options: Any) -> dict[str, Any]:
    """Wait for the end of a job and return its view."""
    deadline = time.monotonic() + 60
    while (view := endpoint.client.get(path, **options).json())["state"] in ("queued", "running"):
        assert time.monotonic() < deadline, f"{path} did not end: {view}"
        time.sleep(0.05)
    return view


def test_a_picture_is_answered_later(endpoint: Any) -> None:
    data = encoded(5, 20, 24)
    taken = endpoint.post(data, "/v1/upscale?format=tiff", headers=LATER)
    assert (taken.status_code, taken.headers["preference-applied"]) == (202, "respond-async")
    where = taken.headers["location"]
    view = ended(endpoint, where)
    assert (view["state"], view["kind"], view["result"]["sizes"]) == (
        "complete",
        "picture",
        [[24, 20], [96, 80]],
    )
    answer = endpoint.client.get(f"{where}/result")
    assert answer.headers["content-type"] == "image/tiff"
    assert np.array_equal(decoded(answer.content), enlarged(data))
    assert endpoint.client.get(f"{where}/report").status_code == 404
    assert view["id"] in [job["id"] for job in endpoint.client.get("/v1/jobs").json()["jobs"]]
    assert endpoint.client.delete(where).status_code == 204
    assert endpoint.client.get(where).status_code == 404


def test_what_is_wrong_with_the_header_is_said_at_once(endpoint: Any) -> None:
    assert endpoint.post(b"hello", headers=LATER).status_code == 415


def test_a_broken_picture_is_a_failed_job(endpoint: Any) -> None:
    where = endpoint.post(encoded(0, 100, 100)[:4000], headers=LATER).headers["location"]
    view = ended(endpoint, where)
    assert view["state"] == "failed"
    assert "truncated" in view["message"]
    assert endpoint.client.get(f"{where}/result").status_code == 409


def test_the_same_idempotency_key_is_the_same_job(endpoint: Any) -> None:
    headers = LATER | {"Idempotency-Key": "monday"}
    first = endpoint.post(encoded(0, 20, 24), headers=headers).json()["id"]
    assert endpoint.post(encoded(0, 20, 24), headers=headers).json()["id"] == first
    other = endpoint.post(encoded(0, 20, 24), "/v1/upscale?seed=2", headers=headers)
    assert (other.status_code, other.json()["type"]) == (422, "/problems/reused_key")


def test_a_job_is_cancelled(start_endpoint: Callable[..., Any]) -> None:
    made = start_endpoint()
    with made.client as client:
        made.model.is_held = True
        where = made.post(encoded(0, 20, 24), headers=LATER).headers["location"]
        waiting = client.get(f"{where}/result")
        assert (waiting.status_code, waiting.headers["retry-after"]) == (409, "2")
        assert client.delete(where).json()["state"] == "cancelled"
        made.model.is_held = False
        assert client.get(where).json()["state"] == "cancelled"
        assert made.model.num_done == 0


def test_a_job_is_cancelled_before_its_task_begins(start_endpoint: Callable[..., Any]) -> None:
    keeper = start_endpoint().services.jobs

    async def run() -> Any:
        taken = await keeper.submit_picture(encoded(0, 20, 24), PictureOptions(), "png", "")
        return await keeper.cancel(taken["id"], "")  # nothing between them lets the task begin

    view = asyncio.run(run())
    assert view["state"] == "cancelled"
    assert stored_state(keeper, view) == "cancelled"


def test_a_job_is_cancelled_while_its_record_is_written(
    start_endpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not overtaken: were "running" written after "cancelled", the next keeper would continue the job."""
    keeper, write_bytes = start_endpoint().services.jobs, storage.write_bytes
    has_begun, may_end, is_overtaken = (threading.Event() for _ in range(3))

    def slow(uri: str, data: bytes, **options: Any) -> None:
        if b'"state": "running"' in data:
            has_begun.set()
            may_end.wait(60)
            is_overtaken.wait(0.2)
        write_bytes(uri, data, **options)
        if b'"state": "cancelled"' in data:
            is_overtaken.set()

    monkeypatch.setattr(storage, "write_bytes", slow)

    async def run() -> list[Any]:
        taken = await keeper.submit_picture(encoded(0, 20, 24), PictureOptions(), "png", "")
        await asyncio.to_thread(has_begun.wait, 60)
        asked = [asyncio.ensure_future(keeper.cancel(taken["id"], "")) for _ in range(2)]
        asyncio.get_running_loop().call_soon(asked[0].cancel)  # its client goes away
        asyncio.get_running_loop().call_soon(may_end.set)
        return await asyncio.gather(*asked, return_exceptions=True)

    gone, view = asyncio.run(run())
    assert isinstance(gone, asyncio.CancelledError)
    assert view["state"] == "cancelled"
    assert stored_state(keeper, view) == "cancelled"


def stored_state(keeper: Any, view: Any) -> str:
    return json.loads((Path(keeper.state) / "jobs" / f"{view['id']}.json").read_text())["state"]


def test_a_new_keeper_continues_what_had_not_ended(
    start_endpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """No job is lost: the first endpoint goes down with one that runs and one that waits."""
    jobs = {"state": str(tmp_path / "state"), "running": 1}
    data = [encoded(6, 20, 24), encoded(7, 20, 24)]
    before = start_endpoint(jobs=jobs)
    with before.client:
        before.model.is_held = True
        places = [before.post(one, headers=LATER).headers["location"] for one in data]
    after = start_endpoint(jobs=jobs)
    with after.client as client:
        for place, one in zip(places, data, strict=True):
            assert ended(after, place)["state"] == "complete"
            assert np.array_equal(decoded(client.get(f"{place}/result").content), enlarged(one))


def test_jobs_are_their_owners(start_endpoint: Callable[..., Any]) -> None:
    keys = {name: new_key() for name in ("alice", "bob")}
    made = start_endpoint(keys=[{"name": name, "sha256": digest(key)} for name, key in keys.items()])
    alice, bob = ({"X-API-Key": key} for key in keys.values())
    with made.client as client:
        where = made.post(encoded(0, 20, 24), headers=LATER | alice).headers["location"]
        assert ended(made, where, headers=alice)["state"] == "complete"
        for path in (where, f"{where}/result", f"{where}/report"):
            assert client.get(path, headers=bob).status_code == 404
        assert client.delete(where, headers=bob).status_code == 404
        assert client.get("/v1/jobs", headers=bob).json() == {"jobs": []}
        assert client.get(f"{where}/result", headers=alice).status_code == 200


def test_old_jobs_are_forgotten(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = start_endpoint(jobs={"state": str(tmp_path / "state"), "keep_hours": 1})
    with made.client as client:
        where = made.post(encoded(0, 20, 24), headers=LATER).headers["location"]
        ended(made, where)
        (file,) = (tmp_path / "state" / "jobs").iterdir()
        while json.loads(file.read_text())["ended"] is None:  # the end is told before it is written
            time.sleep(0.01)
        keeper: Any = made.services.jobs
        client.portal.call(keeper.forget_old)
        assert client.get(where).status_code == 200
        for record in keeper.records.values():
            record.ended -= 3601
        client.portal.call(keeper.forget_old)
        assert client.get(where).status_code == 404
        assert [path for path in (tmp_path / "state").rglob("*") if path.is_file()] == []


def test_bulk_jobs_are_off_unless_places_are_allowed(endpoint: Any) -> None:
    answer = endpoint.client.post("/v1/jobs", json={"source": "/etc", "target": "/tmp/x"})
    assert (answer.status_code, answer.json()["type"]) == (403, "/problems/forbidden")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"source": "/etc"}, 403),
        ({"target": "OUT/../../elsewhere"}, 403),
        ({"source": "http://169.254.169.254/latest/meta-data"}, 403),
        ({"model": "unknown"}, 422),
        ({"unknown": 1}, 422),
        ({"name": "../{name}"}, 422),
        ({"name": "{stem:>2000000000}/{name}.{ext}"}, 422),
        ({"name": "{dir.__class__}"}, 422),
        ({"target": "IN/inside"}, 403),
        ({"tile": 0}, 422),
    ],
)
def test_bulk_jobs_that_cannot_be(
    change: dict[str, Any],
    status: int,
    start_endpoint: Callable[..., Any],
    photos: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    made = start_endpoint(jobs={"sources": [str(photos)], "targets": [str(out)]})
    places = {"IN": str(photos), "OUT": str(out)}
    for short, path in places.items():
        change = {
            name: value.replace(short, path) if isinstance(value, str) else value
            for name, value in change.items()
        }
    answer = made.client.post("/v1/jobs", json={"source": str(photos), "target": f"{out}/x4"} | change)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), (
        answer.text
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("quality", 101, "must lie in 1 to 100, got 101"),
        ("tile", 0, "must be at least 1 for nearest-x4, got 0"),
        ("steps", 9, "must lie in 1 to 1 for nearest-x4, got 9"),
        ("outscale", 17, "must be a number in (0, 16], got 17.0"),
        ("name", "{x}", "'{x}' uses {x}; allowed: {dir}, {name}, {stem}, {ext}, {scale}"),
    ],
)
def test_each_edge_names_a_wrong_option_as_its_callers_know_it(
    option: str,
    value: Any,
    message: str,
    job: Callable[..., int],
    start_endpoint: Callable[..., Any],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"source": str(photos), "target": str(tmp_path / "out")}
    assert job("upscale", *places.values(), "--model", "nearest-x4", f"--{option}", str(value)) == 2
    assert capsys.readouterr().err == f"error: --{option} {message}\n"
    made = start_endpoint(jobs={"sources": [str(photos)], "targets": [str(tmp_path / "out")]})
    problem = made.client.post("/v1/jobs", json=places | {option: value}).json()
    assert (problem["type"], problem["status"]) == ("/problems/bad_option", 422)
    assert problem["detail"] == f"{option} {message}"
    assert problem["errors"] == [{"option": option, "message": message}]


def test_a_bulk_job_waits_while_another_run_works_there_and_says_so(
    start_endpoint: Callable[..., Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr("serve.jobs._OCCUPIED_S", 0.1)
    out = tmp_path / "out"
    made = start_endpoint(jobs={"sources": [str(photos)], "targets": [str(out)]})
    with made.client as client, lease.held(str(out)):
        where = client.post("/v1/jobs", json={"source": str(photos), "target": str(out)}).headers["location"]
        deadline = time.monotonic() + 60
        while not (view := client.get(where).json()).get("message"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert view["state"] == "running"
        assert view["message"].startswith("another run works at ")
        assert client.delete(where).json()["state"] == "cancelled"
        assert [path.suffix for path in (out / "_resshift" / "working").iterdir()] == [
            ".json"
        ]  # of the other run alone
        assert not (out / "_resshift" / "job.json").exists()


def test_bulk_job_bodies_must_be_json(endpoint: Any) -> None:
    """A form of another site cannot send JSON without being asked by the browser first."""
    answer = endpoint.client.post(
        "/v1/jobs", content=b'{"source": "/a", "target": "/b"}', headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 422
    assert "Content-Type: application/json, got 'text/plain'" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 422), (b"[]", 422), (b"", 422), (b'{"source": "/a"}', 422), (b" " * 1_000_001, 413)],
)
def test_bulk_job_bodies_that_cannot_be(endpoint: Any, body: bytes, status: int) -> None:
    answer = endpoint.client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), (
        answer.text
    )
    assert endpoint.services.budget.used == 0


def test_state_has_a_default_place(
    start_endpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from serve.jobs import JobKeeper

    monkeypatch.setenv("RESSHIFT_CACHE", str(tmp_path))
    made = start_endpoint()
    settings = replace(made.services.settings, jobs=replace(made.services.settings.jobs, state=""))
    assert JobKeeper(settings, made.pictures).state == str(tmp_path / "serve")
