"""Measure how a bulk job of millions of inputs is continued: seconds to the first new input, LISTs, and
memory.

    python benchmarks/restart.py --keys 5000000 --done 4900000 --list-s 0.1

A process of its own is the bucket: it makes up a listing and takes `--list-s` for each page of 1000 keys.
The ledger has a row for each of the first `--done` keys, in parts of fifty thousand. Three ways to continue:

    cursors    the run before was stopped: its cursors say what is finished
    parts      there are none (a new pass, or a ledger of an earlier version): ranges by parts of the ledger
    serial     as before ranges of keys: all rows, then the listing from its first key

Each is a process that ends with the first input that is not done. The time does not include the start of a
cluster; the memory is the largest resident set of that process.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import socket
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ledger import cursors, ledger
from pipelines.ledger.cursors import Finished

_PAGE = 1000
_PART = 50_000


def key_of(i: int) -> str:
    """Return the key of an input; keys sort as their numbers do."""
    return f"{i // 10_000:05}/{i % 10_000:04}.png"


def first_from(key: str, num_keys: int) -> int:
    """Return the number of the first key that is greater than a text, by bisection."""
    low, high = 0, num_keys
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if key_of(middle) > key else (middle + 1, high)
    return low


class Bucket(BaseHTTPRequestHandler):
    """ListObjectsV2 of made-up keys below in/."""

    protocol_version = "HTTP/1.1"
    num_keys = 0
    list_s = 0.0
    lists = 0

    def do_GET(self) -> None:
        query = parse_qs(urlparse(self.path).query)
        if "list-type" not in query:
            self._answer(str(Bucket.lists).encode())
            return
        Bucket.lists += 1
        time.sleep(self.list_s)
        after = query.get("start-after", ["in/"])[0].removeprefix("in/")
        start = (
            int(query["continuation-token"][0])
            if "continuation-token" in query
            else first_from(after, self.num_keys)
        )
        stop = min(start + int(query.get("max-keys", [str(_PAGE)])[0]), self.num_keys)
        items = "".join(
            f"<Contents><Key>in/{key_of(i)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f'<ETag>"{i:032x}"</ETag><Size>1000</Size></Contents>'
            for i in range(start, stop)
        )
        more = stop < self.num_keys
        token = f"<NextContinuationToken>{stop}</NextContinuationToken>" if more else ""
        self._answer(
            f'<?xml version="1.0"?><ListBucketResult><Name>big</Name><KeyCount>{stop - start}</KeyCount>'
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{items}</ListBucketResult>".encode()
        )

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def serve(port: int, num_keys: int, list_s: float) -> None:
    """Be the bucket."""
    Bucket.num_keys, Bucket.list_s = num_keys, list_s
    ThreadingHTTPServer(("127.0.0.1", port), Bucket).serve_forever()


def write_ledger(root: Path, done: int) -> None:
    """Write rows of the first keys."""
    folder = root / ledger.DIRECTORY / "ledger"
    folder.mkdir(parents=True)
    for start in range(0, done, _PART):
        numbers = range(start, min(start + _PART, done))
        keys = [key_of(i) for i in numbers]
        columns: dict[str, Any] = {
            "key": keys,
            "etag": [f"{i:032x}" for i in numbers],
            "status": ["ok"] * len(keys),
            "output": [f"{key[:-4]}_x4.png" for key in keys],
        }
        blank = {field.name: pa.nulls(len(keys), field.type) for field in ledger.SCHEMA}
        table = pa.table(
            {name: pa.array(columns[name]) if name in columns else blank[name] for name in blank},
            schema=ledger.SCHEMA,
        )
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        (folder / f"part-{start:020}-0.parquet").write_bytes(sink.getvalue())


def continued(way: str, target: str) -> dict[str, Any]:
    """Find the first input that is not done."""
    from pipelines.bulk.driver import Driver
    from pipelines.bulk.request import BulkRequest

    started = time.monotonic()
    request = BulkRequest(source="s3://big/in", target=target, model="nearest-x4")
    job = request.job()
    if way == "serial":
        batches = request.inputs().worklist(job.stages, request.entries()).batches()
        num_ranges = 1
    else:
        sweep = request.sweep(job, request.entries())
        num_ranges = len(sweep.queue)
        engine: Any = None
        driver = Driver(job, sweep.inputs, "run", lambda: engine)
        driver.give(*sweep.queue)
        driver.complete()
        batches = driver.batches()
    key = next(item.key for items, _ in batches for item in items)
    return {
        "first_input_s": round(time.monotonic() - started, 2),
        "cpu_s": round(time.process_time(), 1),
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
        "ranges": num_ranges,
        "key": key,
    }


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=5_000_000)
    parser.add_argument("--done", type=int)
    parser.add_argument("--list-s", type=float, default=0.1)
    parser.add_argument("--ways", default="cursors,parts", help="of the three above")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.way:
        print(json.dumps(continued(chosen.way, chosen.target)))
        return 0
    done = chosen.done or chosen.keys * 98 // 100
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bucket = multiprocessing.get_context("spawn").Process(
        target=serve, args=(port, chosen.keys, chosen.list_s)
    )
    bucket.start()
    result: dict[str, Any] = {"keys": chosen.keys, "done": done, "list_s": chosen.list_s}
    try:
        with tempfile.TemporaryDirectory(prefix="restart-") as target:
            write_ledger(Path(target), done)
            for way in chosen.ways.split(","):
                environment = {
                    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                    "AWS_ACCESS_KEY_ID": "test",
                    "AWS_SECRET_ACCESS_KEY": "test",
                    "AWS_DEFAULT_REGION": "us-east-1",
                }
                result[way] = measure(way, target, done, environment)
                print(json.dumps({way: result[way]}), flush=True)
    finally:
        bucket.terminate()
        bucket.join()
    print(json.dumps(result))
    return 0


def measure(way: str, target: str, done: int, environment: dict[str, str]) -> dict[str, Any]:
    """Continue in a process of its own."""
    import os
    import urllib.request

    def lists() -> int:
        with urllib.request.urlopen(f"{environment['AWS_ENDPOINT_URL']}/lists") as answer:
            return int(answer.read())

    which = {"include": [], "exclude": [], "min_bytes": 0, "max_bytes": None}
    which |= {"source": "s3://big/in", "retry_failed": False}
    cursors.remove(target)
    if way == "cursors":
        cursors.write(target, which, Finished([("", key_of(done).removesuffix(".png"))]))
    before = lists()
    command = [sys.executable, __file__, "--way", way, "--target", target]
    told = subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True)
    return json.loads(told.stdout.splitlines()[-1]) | {"lists": lists() - before}


if __name__ == "__main__":
    sys.exit(main())
