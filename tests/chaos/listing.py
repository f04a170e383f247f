"""A bucket that lists a million keys (or ten): seconds to the first output, and the memory of the driver over
time.

    python tests/chaos/listing.py [--keys 1000000]

A small server makes up the listing and serves one picture for every key. Two runs: a fresh job, stopped after
its first outputs; and a job whose ledger has all keys but a hundred, which goes through the whole listing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import harness
import numpy as np

from pipelines.ledger import ledger
from tests.pictures import file_of
from tests.servers import using_store

PER_PREFIX = 1000


def key_of(i: int) -> str:
    return f"{i // PER_PREFIX:06d}/{i % PER_PREFIX:04d}.png"


def etag_of(i: int) -> str:
    return f"{i:032x}"


class Bucket(BaseHTTPRequestHandler):
    """ListObjectsV2 of made-up keys, GET of one picture."""

    protocol_version = "HTTP/1.1"
    num_keys = 0
    picture = b""

    def do_GET(self) -> None:
        address = urlparse(self.path)
        query = parse_qs(address.query)
        if "list-type" in query:
            start = int(query.get("continuation-token", ["0"])[0])
            stop = min(start + 1000, self.num_keys)
            items = "".join(
                f"<Contents><Key>in/{key_of(i)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f'<ETag>"{etag_of(i)}"</ETag><Size>{len(self.picture)}</Size></Contents>'
                for i in range(start, stop)
            )
            more = stop < self.num_keys
            token = f"<NextContinuationToken>{stop}</NextContinuationToken>" if more else ""
            body = (
                f'<?xml version="1.0"?><ListBucketResult><Name>big</Name><KeyCount>{stop - start}</KeyCount>'
                f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{items}</ListBucketResult>"
            ).encode()
            self._answer(body, "application/xml")
        else:
            self._answer(self.picture, "image/png")

    def _answer(self, body: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def rss_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0.0


def watch(pid: int, samples: list[float], stop: threading.Event) -> None:
    while not stop.wait(1.0):
        if (value := rss_mb(pid)) > 0:
            samples.append(round(value))


def write_ledger(root: str, count: int) -> None:
    """Write a ledger that has done the first `count` keys, in parts of ten thousand."""
    for start in range(0, count, 10_000):
        rows = [
            ledger.row(
                key_of(i),
                etag_of(i),
                "ok",
                output=f"{key_of(i)[:-4]}_x4.png",
                width_in=64,
                height_in=64,
                width_out=256,
                height_out=256,
                bytes_in=1,
                bytes_out=1,
                model_seconds=0.01,
            )
            for i in range(start, min(start + 10_000, count))
        ]
        ledger.append(root, rows)


def main() -> int:
    """Run and measure."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--keys", type=int, default=1_000_000)
    chosen = options.parse_args()
    Bucket.num_keys, Bucket.picture = chosen.keys, file_of(np.zeros((64, 64, 3), np.uint8))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    arguments = ["--model", "nearest-x4", "--replicas", "1:1"]
    with (
        tempfile.TemporaryDirectory(prefix="listing-") as temporary,
        using_store(f"http://127.0.0.1:{server.server_address[1]}"),
    ):
        work = Path(temporary)
        fresh = work / "fresh"
        started = time.monotonic()
        process = harness.start("s3://big/in", str(fresh), *arguments, log=work / "job.log")
        first = None
        try:
            while first is None and process.poll() is None and time.monotonic() - started < 300:
                time.sleep(0.1)
                if next(fresh.glob("0*/*.png"), None) is not None:
                    first = time.monotonic() - started
            time.sleep(3)
            fresh_rss = rss_mb(process.pid)
        finally:
            harness.end(process)

        target = str(work / "resumed")
        write_ledger(target, chosen.keys - 100)
        samples: list[float] = []
        stop = threading.Event()
        started = time.monotonic()
        process = harness.start("s3://big/in", target, *arguments, log=work / "job.log")
        watcher = threading.Thread(target=watch, args=(process.pid, samples, stop))
        watcher.start()
        try:
            code = process.wait(3600)
        finally:
            stop.set()
            watcher.join()
            harness.end(process)
        wall = time.monotonic() - started
        outputs = sum(1 for _ in Path(target).glob("0*/*.png"))
        if code:
            print((work / "job.log").read_text(errors="replace")[-4000:])
    shown = samples[:: max(1, len(samples) // 12)]
    print(f"fresh: first output after {first and round(first, 1)} s, driver {fresh_rss:.0f} MB")
    print(
        f"resumed: {chosen.keys} keys in {wall:.0f} s, driver MB over time: {shown}, highest "
        f"{max(samples, default=0):.0f}"
    )
    result = {
        "keys": chosen.keys,
        "first_output_s": None if first is None else round(first, 1),
        "driver_mb_fresh": round(fresh_rss),
        "resumed_wall_s": round(wall, 1),
        "driver_mb": shown,
        "driver_mb_highest": max(samples, default=0),
    }
    claims = {
        "first output within 60 s": first is not None and first < 60,
        "the whole listing was read, and what was left was done": code == 0 and outputs == 100,
        "driver below 1 GB": max(samples, default=1e9) < 1000,
        # Libraries are a gigabyte of it. What the listing may add are the digests of the ledger, 40 bytes a
        # key, and the report at the end.
        "the driver does not grow with the listing": len(samples) > 20
        and max(samples) - samples[10] < 100 + 100e-6 * chosen.keys,
    }
    return harness.report(result, claims)


if __name__ == "__main__":
    sys.exit(main())
