"""A bulk job over HTTP from bucket to bucket: submitted twice under one idempotency key, watched, cancelled,
submitted again, compared.

    python tests/chaos/http_jobs.py [--pictures 400]

A real endpoint and an S3 server on loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import httpx2

from resshift import images, storage
from resshift.storage import s3
from tests import servers

SOURCE, TARGET = "s3://pictures/in", "s3://pictures/out/x4"


def until(
    view: Callable[[], dict[str, Any]], condition: Callable[[dict[str, Any]], bool], timeout_s: float = 240
) -> dict[str, Any]:
    """Ask until a view is as wanted, and return it.

    Raises:
        RuntimeError: it did not come to that.
    """
    deadline = time.monotonic() + timeout_s
    while not condition(found := view()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {timeout_s:g} s: {found}")
        time.sleep(0.3)
    return found


def use(client: httpx2.Client, cancel_at: int) -> tuple[dict[str, Any], dict[str, bool]]:
    """Do what a user does; returns figures and claims."""
    job = {"source": SOURCE, "target": TARGET}

    def submit(**headers: str) -> httpx2.Response:
        return client.post("/v1/jobs", json=job, headers=headers)

    def view(id: str) -> dict[str, Any]:
        return client.get(f"/v1/jobs/{id}").json()

    outside = client.post("/v1/jobs", json=job | {"source": "s3://other/in"}).status_code
    first, same = submit(**{"Idempotency-Key": "one"}), submit(**{"Idempotency-Key": "one"})
    id = first.json()["id"]
    watched = until(lambda: view(id), lambda one: one.get("progress", {}).get("done", 0) >= cancel_at)
    cancelled = client.delete(f"/v1/jobs/{id}").json()["state"]
    rows_when_cancelled = len(harness.all_rows(TARGET))
    again = submit().json()["id"]
    ended = until(lambda: view(again), lambda one: one["state"] not in ("running", "waiting"))
    report = client.get(f"/v1/jobs/{again}/report")
    rows = harness.all_rows(TARGET)
    wrong = 0
    for row in rows:
        given, made = (
            images.decode(storage.read_bytes(uri)).pixels
            for uri in (f"{SOURCE}/{row['key']}", f"{TARGET}/{row['output']}")
        )
        wrong += not (made == given.repeat(4, axis=0).repeat(4, axis=1)).all()
    result = {
        "progress": watched["progress"],
        "rows_when_cancelled": rows_when_cancelled,
        "counts": ended.get("counts"),
        "rows": len(rows),
        "wrong_outputs": wrong,
        "report": report.status_code,
    }
    claims = {
        "a bucket that is not allowed is refused": outside == 403,
        "one key is one job": (first.status_code, same.json()["id"]) == (202, id),
        "a cancelled job says so, and keeps what it has": cancelled == "cancelled"
        and rows_when_cancelled >= cancel_at,
        "submitted again, it is completed": ended["state"] == "complete",
        "0 duplicate rows": harness.duplicates(rows) == 0,
        "0 wrong outputs": wrong == 0,
        "the report is there": report.status_code == 200,
    }
    return result, claims


def main() -> int:
    """Run and compare."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--pictures", type=int, default=400)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="http-jobs-") as temporary, contextlib.ExitStack() as stack:
        work = Path(temporary)
        port = stack.enter_context(servers.moto(work / "moto.log"))
        stack.enter_context(servers.using_store(f"http://127.0.0.1:{port}"))
        s3.call(s3.DEFAULT, "create_bucket", Bucket="pictures")
        harness.make_pictures(SOURCE, chosen.pictures)
        places = {"sources": [SOURCE], "targets": ["s3://pictures/out"], "state": "s3://pictures/state"}

        def change(config: Any) -> None:
            config["applications"][1]["args"]["jobs"] = places

        _, port, _ = stack.enter_context(harness.endpoint(work, change, "--model", "nearest-x4@24"))
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until(lambda: {"status": _status(client)}, lambda one: one["status"] == 200)
            result, claims = use(client, chosen.pictures // 4)
    claims["every input has one row"] = result["rows"] == chosen.pictures
    return harness.report(result, claims)


def _status(client: httpx2.Client) -> int:
    try:
        return client.get("/readyz").status_code
    except httpx2.HTTPError:
        return 0  # it is being started


if __name__ == "__main__":
    sys.exit(main())
