"""Measure how fast the pairs of a training run reach its ranks on a simulated cluster, or from a bucket that
takes its time.

A pair is a sleep (sleeping/), so that neither the number of nodes nor that of ranks is limited by the
cores of this machine: what is measured is whether all CPUs that the workers leave for data are used, and
whether every rank gets its share. Ranks take all that they get; in a training run they wait for each other.

    python benchmarks/ranks.py --ranks 8 --nodes 8
    python benchmarks/ranks.py --ranks 64 --nodes 8 --pair-s 0.005
    python benchmarks/ranks.py --ranks 64 --batch 768 --latency-s 0.05 --pair-s 0.004

The last line is a JSON object with the main figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cpu_time
import numpy as np
import ray
import record
import scale
import torch
from numpy.typing import NDArray

from pipelines.cluster import ray_internals
from pipelines.pairs import maker as pairs
from pipelines.pairs.dataset import filled, rows_per_task, rows_per_turn
from pipelines.pairs.maker import PairMaker
from pipelines.pairs.order import spans
from pipelines.pairs.parcels import Turns
from pipelines.pairs.ranks import PairStream, rank_batches, start_dealer
from pipelines.pairs.share import Share
from pipelines.shards.parquet import read_manifest, row_groups, write_shard_file
from pipelines.shards.prepare import finish
from resshift.config import DataConfig
from resshift.presets import preset

_STORE_BYTES = 200 << 20
_GROUP_ROWS = 16  # as in shards of ImageNet
_SLEEPING = record.ROOT / "benchmarks" / "sleeping"
Report = Callable[[dict[str, Any]], None]


def configuration(batch_size: int, crop_px: int = 32) -> Any:
    """Return the configuration of a run; its pairs are small."""
    run = preset("realsr-x4-s4")
    return SimpleNamespace(
        data=DataConfig(crop_px=crop_px),
        degradation=run.degradation,
        train=replace(run.train, batch_size=batch_size),
    )


def write_photos(root: str, num_shards: int, groups_per_shard: int, photo_bytes: int) -> None:
    """Write shards of photos that nobody decodes."""
    rng = np.random.default_rng(0)
    shards = [
        write_shard_file(
            root,
            f"shard-{i:05d}.parquet",
            str(i),
            [
                {
                    "key": f"{i}/{j}",
                    "sha256": f"{i}/{j}",
                    "bytes": rng.bytes(photo_bytes),
                    "status": "ok",
                    "reason": "",
                }
                for j in range(groups_per_shard * _GROUP_ROWS)
            ],
            _GROUP_ROWS,
            1 << 40,
        )
        for i in range(num_shards)
    ]
    finish(shards, "nowhere", root)


class Consumers:
    """All ranks, a thread each: taking pairs costs next to nothing, and processes cost much."""

    def __init__(self, stream: PairStream, dealer: str | None) -> None:
        self._rows = [0] * stream.num_ranks
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._consume, args=(stream, rank, dealer), daemon=True)
            for rank in range(stream.num_ranks)
        ]
        for thread in self._threads:
            thread.start()

    def _consume(self, stream: PairStream, rank: int, dealer: str | None) -> None:
        try:
            for batch in rank_batches(stream, 0, rank=rank, dealer=dealer):
                self._rows[rank] += len(batch["row"])
                if self._stop.is_set():
                    return
        except Exception as error:  # told to the thread that measures
            self._error = error

    def rows(self) -> NDArray[np.int64]:
        """Return the number of rows that each rank has got."""
        if self._error is not None:
            raise self._error
        return np.array(self._rows, np.int64)

    def stop(self, dealer: Any) -> None:
        """Let each rank end; one that still waits for a batch would connect to Ray anew after its end."""
        self._stop.set()
        if dealer is not None:
            ray.kill(dealer)
        for thread in self._threads:
            thread.join(60)


def made(counts: Path) -> NDArray[np.int64]:
    """Return how many pairs each process of the cluster has made."""
    return np.array([int(np.fromfile(path, np.int64)[0]) for path in counts.iterdir()], np.int64)


def cpu_of_a_pair(pair_s: float, crop_px: int, counts: Path) -> float:
    """Return the CPU seconds of a pair that sleeps, without all that is around it."""
    counts.mkdir()
    make: Any = runpy.run_path(str(_SLEEPING / "sitecustomize.py"))["SleepingPairs"](pair_s, counts)
    crop, recipe = SimpleNamespace(crop_px=crop_px), SimpleNamespace(scale=4)
    began, num_pairs = time.process_time(), 200
    for i in range(num_pairs):
        make(b"", str(i), 0, 0, crop, recipe)
    return (time.process_time() - began) / num_pairs


def measure(options: argparse.Namespace, work: Path, report: Report) -> None:
    """Run the ranks on a simulated cluster and report the figures of the time after the start."""
    counts, root = work / "counts", str(work / "shards")
    counts.mkdir()
    config = configuration(options.batch)
    pair_cpu_s = cpu_of_a_pair(options.pair_s, config.data.crop_px, work / "alone")
    write_photos(root, 8, 16, 200)
    # Read by every process of the cluster.
    os.environ["PAIRS_COUNTED"], os.environ["PAIR_SECONDS"] = str(counts), str(options.pair_s)
    os.environ["PYTHONPATH"] = f"{_SLEEPING}:{record.ROOT}"
    os.environ.update(ray_internals.METADATA_INLINE)
    data_cpus = options.nodes * options.cpus
    with scale.head() as cluster:
        for _ in range(options.nodes):
            # The CPUs that workers would hold are left out.
            cluster.add_node(num_cpus=options.cpus, object_store_memory=_STORE_BYTES)
        ray.init(address=cluster.address, log_to_driver=options.log)
        try:
            stream = PairStream(root=root, config=config, num_ranks=options.ranks, held_cpus=0)
            began = time.monotonic()
            name, dealer = start_dealer(stream) if options.ranks > 1 else (None, None)
            consumers = Consumers(stream, name)
            first_s = wait(lambda: bool(consumers.rows().min()), began, options.start_s)
            all_s = wait(lambda: len(made(counts)) >= data_cpus, began, options.start_s)
            time.sleep(options.settle_s)
            taken, count, began = consumers.rows(), made(counts).sum(), time.monotonic()
            busy, cpu = scale.cpu_seconds(), cpu_time.cpu_by_kind()
            time.sleep(options.seconds)
            num_pairs, took = int(made(counts).sum() - count), time.monotonic() - began
            rates, rate = (consumers.rows() - taken) / took, num_pairs / took
            spent = cpu_time.since(cpu)
            spent["tasks"] -= pair_cpu_s * num_pairs
            report(
                {
                    "ranks": options.ranks,
                    "nodes": options.nodes,
                    "data_cpus": data_cpus,
                    "pair_s": options.pair_s,
                    "batch_size": options.batch,
                    "possible_per_s_rank": round(data_cpus / options.pair_s / options.ranks, 1),
                    "pairs_per_s_rank": round(rate / options.ranks, 1),
                    "taken_per_s_rank": round(float(rates.mean()), 1),
                    "cpus_busy": round(rate * options.pair_s / data_cpus, 3),
                    "slowest_over_mean": round(float(rates.min() / max(rates.mean(), 1e-9)), 3),
                    "first_batch_s": first_s,
                    "started_s": all_s,
                    "machine_busy": scale.cpu_busy(busy, scale.cpu_seconds()),
                    "cpu_s_per_s": {kind: round(seconds / took, 3) for kind, seconds in spent.items()},
                    "cpu_ms_pair": {
                        kind: round(1e3 * seconds / max(1, num_pairs), 3) for kind, seconds in spent.items()
                    },
                }
            )
            consumers.stop(dealer)
        finally:
            ray.shutdown()


def wait(condition: Callable[[], bool], began: float, most_s: float) -> float | None:
    """Wait until it holds; return the seconds since `began`, None after `most_s`."""
    while not condition():
        if time.monotonic() - began > most_s:
            return None
        time.sleep(0.5)
    return round(time.monotonic() - began, 1)


class Store:
    """A bucket on loopback whose objects are the files of a folder; each answer takes a while."""

    def __init__(self, folder: Path, latency_s: float) -> None:
        self.asked: list[tuple[str, str]] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path, part = self.path.split("?")[0], self.headers.get("Range", "")
                asked.append((path, part))
                time.sleep(latency_s)
                whole = (folder / path.lstrip("/")).read_bytes()
                first, _, last = part.removeprefix("bytes=").partition("-")
                start = int(first) if first else max(0, len(whole) - int(last or len(whole)))
                data = whole[start : int(last) + 1 if first and last else None]
                self.send_response(206 if part else 200)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{len(whole)}")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()


def measure_store(options: argparse.Namespace, work: Path, report: Report) -> None:
    """Let one core make the pairs of a few tasks from a bucket and report the share of the time in which it
    is busy.
    """
    write_photos(str(work / "bucket" / "shards"), 24, 32, options.photo_kb << 10)
    store = Store(work, options.latency_s)
    os.environ |= {"AWS_ENDPOINT_URL": store.url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    os.environ |= {"AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    made = runpy.run_path(str(_SLEEPING / "sitecustomize.py"))["SleepingPairs"]
    pairs.make_pair = made(options.pair_s, work)
    root, config = "s3://bucket/shards", configuration(options.batch, crop_px=256)  # as large as in training
    share = Share(cpus=8 * options.nodes, object_store_bytes=1 << 40)
    turns = Turns(options.batch, options.ranks, rows_per_turn(config, share, options.ranks))
    maker = PairMaker(root, 0, configuration(options.batch).data, config.degradation)
    size = rows_per_task(config, share)
    tasks = filled(spans(row_groups(read_manifest(root)), 0, 0, 3 * size), itertools.repeat(size), size)
    num_rows, took = 0, 0.0
    for i, task in enumerate(tasks):
        began = time.perf_counter()
        for _ in maker.blocks(task, turns):
            pass
        if i:  # the first opens connections
            took += time.perf_counter() - began
            num_rows += sum(span.num_rows for span in task)
    store.close()
    reads = [ask for ask in store.asked if "parquet" in ask[0]]
    groups = [ask for ask in reads if not ask[1].startswith("bytes=-")]
    report(
        {
            "ranks": options.ranks,
            "batch_size": options.batch,
            "latency_s": options.latency_s,
            "pair_s": options.pair_s,
            "rows": num_rows,
            "core_busy": round(num_rows * options.pair_s / took, 3),
            "reads_per_group": round(len(groups) / len(set(groups)), 2),
            "requests_per_group": round(len(reads) / len(set(groups)), 2),
        }
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--ranks", type=int, default=8, help="ranks of the run (8)")
    parser.add_argument("--nodes", type=int, default=8, help="nodes of the simulated cluster (8)")
    parser.add_argument("--cpus", type=int, default=3, help="CPUs of a node that workers leave for data (3)")
    parser.add_argument("--pair-s", type=float, default=0.005, help="seconds that a pair takes (0.005)")
    parser.add_argument("--seconds", type=float, default=40, help="seconds of the measurement (40)")
    parser.add_argument("--start-s", type=float, default=300, help="most seconds to wait for all CPUs (300)")
    parser.add_argument("--settle-s", type=float, default=30, help="seconds until the measurement then (30)")
    parser.add_argument("--latency-s", type=float, help="measure a task on a bucket that answers after this")
    parser.add_argument("--batch", type=int, help="global batch size (12 for each rank)")
    parser.add_argument("--photo-kb", type=int, default=24, help="kilobytes of a photo in the bucket (24)")
    parser.add_argument("--write", action="store_true", help="add the run to the day's file of results")
    parser.add_argument("--log", action="store_true", help="show the output of all processes")
    options = parser.parse_args(argv)
    options.batch = options.batch or 12 * options.ranks
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and the JSON line; return 0."""
    options = parse(argv)
    os.environ.update(scale.ENVIRONMENT)
    where, load = record.machine(torch.device("cpu")), round(os.getloadavg()[0], 1)

    def report(figures: dict[str, Any]) -> None:
        """Print and write before the cluster ends, which may take longer than a caller waits."""
        print(record.table(["figure", "value"], [[name, value] for name, value in figures.items()]))
        run = {"command": where["command"], "commit": where["commit"], "load_average": load, **figures}
        if options.write:
            path = record.RESULTS / record.file_name("ranks", where)
            known = json.loads(path.read_text()) if path.exists() else {"runs": []}
            record.write(
                path, {"benchmark": "ranks", **known, "machine": where, "runs": [*known["runs"], run]}
            )
        print(record.json_line({"benchmark": "ranks", **run}), flush=True)

    with tempfile.TemporaryDirectory(prefix="ranks-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        (measure if options.latency_s is None else measure_store)(options, Path(folder), report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
