"""Measure training pairs per second of the Ray Data pipeline, compared with the same number of bare
processes that only call the function.

Both are timed in turn by wall time, on the same photos. The overhead is the share of the processes' rate that
the pipeline does not reach: reading shards, starting tasks, moving pairs through the object store, ordering,
and the consumer. Start-up is excluded.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from pipelines.cluster import ray_internals
from pipelines.command import quiet_ray_data
from pipelines.pairs.dataset import rows_per_task, task_sizes
from pipelines.pairs.ranks import PairStream, rank_batches
from pipelines.pairs.share import left_by_workers
from pipelines.shards.build import ShardOptions
from pipelines.shards.prepare import prepare_here
from resshift.config import DataConfig
from resshift.devices import use_one_thread
from resshift.pairs.training_pair import make_pair
from resshift.presets import preset

_STORE_BYTES = 2 << 30  # Ray's default would be 30 % of the machine's memory
_START_S = 30.0  # until the daemons and agents of a cluster have started and finished their imports
_BATCH = 64
# A block arrives every half second; polling five times a second took 0.01 of a core here, and more in Ray's
# daemons.
_WATCH_S = 1.0


@dataclass(slots=True)
class StorePeak:
    """Largest number of bytes in the object store of the cluster while it was watched."""

    num_bytes: int = 0

    def watch(self, stop: threading.Event) -> None:
        while not stop.wait(_WATCH_S):
            self.num_bytes = max(self.num_bytes, store_bytes())


def _make_pairs(
    photos: Sequence[tuple[str, bytes]], crop: DataConfig, first: int, seconds: float, start: Any, out: Any
) -> None:
    recipe = preset("realsr-x4-s4").degradation
    use_one_thread()
    for key, data in photos[:32]:
        make_pair(data, key, 0, 0, crop, recipe)  # fills tables, plans and caches, as a worker does once
    start.wait()
    began, count = time.monotonic(), 0
    while (taken := time.monotonic() - began) < seconds:
        key, data = photos[(first + count) % len(photos)]
        make_pair(data, key, count // len(photos), 0, crop, recipe)
        count += 1
    out.put(count / taken)


def bare_rate(
    photos: Sequence[tuple[str, bytes]], crop: DataConfig, num_processes: int, seconds: float
) -> float:
    """Return the pairs per second of `num_processes` together, each calling only `make_pair`."""
    context = multiprocessing.get_context("spawn")
    start, out = context.Barrier(num_processes), context.Queue()
    processes = [
        context.Process(
            target=_make_pairs, args=(photos, crop, i * len(photos) // num_processes, seconds, start, out)
        )
        for i in range(num_processes)
    ]
    for process in processes:
        process.start()
    rates = [out.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


def store_bytes() -> int:
    """Return the bytes of referenced objects in the object stores of the cluster."""
    name = "object_store_memory"
    return int(ray.cluster_resources()[name] - ray.available_resources().get(name, 0.0))


def take_until_waited(batches: Iterator[dict[str, Any]], wait_s: float = 0.02) -> int:
    """Take batches until one is not ready, and return the number of their rows: then the store holds nothing
    that could be taken.
    """
    count = 0
    while True:
        asked = time.monotonic()
        count += len(next(batches)["row"])
        if time.monotonic() - asked > wait_s:
            return count


def ray_rate(root: str, crop: DataConfig, num_cpus: int, seconds: float) -> tuple[float, int]:
    """Return the pairs per second that are made for a consumer of `rank_batches`, and the peak of the object
    store in bytes.

    Pairs in the store are counted in addition to those consumed: tasks behind the first one may hold a
    thousand finished pairs, and more or fewer at the end than at the beginning.
    """
    config = preset("realsr-x4-s4")
    config = replace(config, data=crop, train=replace(config.train, batch_size=_BATCH))
    ready = time.monotonic() + _START_S
    os.environ.update(ray_internals.METADATA_INLINE)
    ray.init(
        address="local",
        num_cpus=num_cpus,
        object_store_memory=_STORE_BYTES,
        log_to_driver=False,
        include_dashboard=False,
    )
    quiet_ray_data()
    peak, stop = StorePeak(), threading.Event()
    watcher = threading.Thread(target=peak.watch, args=(stop,))
    try:
        watcher.start()
        share = left_by_workers(0)
        batches = rank_batches(PairStream(root=root, config=config, held_cpus=0), 0)
        # Until every worker has finished its imports and tasks have their full length.
        full = rows_per_task(config, share)
        rows = sum(itertools.takewhile(lambda size: size < full, task_sizes(config, share)))
        while rows > 0 or time.monotonic() < ready:
            rows -= len(next(batches)["row"])
        take_until_waited(batches)
        began, count, stored = time.monotonic(), 0, -store_bytes()
        while (taken := time.monotonic() - began) < seconds:
            count += take_until_waited(batches)
        stored += store_bytes()
        batches.close()
        pair_bytes = 3 * (crop.crop_px**2 + (crop.crop_px // config.degradation.scale) ** 2)
        return (count + stored / pair_bytes) / taken, peak.num_bytes
    finally:
        stop.set()
        watcher.join()
        ray.shutdown()


def measure_pipeline(
    photos: Sequence[tuple[str, bytes]], crop: DataConfig, seconds: float, rounds: Mapping[int, int]
) -> dict[str, Any]:
    """Time both in turn and return the figures.

    Rates and overheads are medians over the rounds: on a shared machine, two rates are comparable only if one
    is measured directly after the other. `ray_overhead` is the overhead on the largest number of cores.

    Args:
        photos: Key and encoded bytes of each photo.
        crop: How training crops are cut.
        seconds: Duration of each measurement.
        rounds: Number of rounds for each number of cores.
    """
    figures: dict[str, Any] = {"store_limit_mb": _STORE_BYTES / 1e6}
    with tempfile.TemporaryDirectory(prefix="pairs-") as temporary:
        source, root = Path(temporary) / "photos", str(Path(temporary) / "shards")
        source.mkdir()
        for i, (_, data) in enumerate(photos):
            (source / f"{i:05d}.jpg").write_bytes(data)
        # Row groups have the same size as in shards of ImageNet.
        prepare_here(str(source), root, ShardOptions())
        for num, num_rounds in rounds.items():
            bare, piped, peak = list[float](), list[float](), 0
            for _ in range(num_rounds):
                bare.append(bare_rate(photos, crop, num, seconds))
                rate, num_bytes = ray_rate(root, crop, num, seconds)
                piped.append(rate)
                peak = max(peak, num_bytes)
            overheads = [1 - ray / alone for ray, alone in zip(piped, bare, strict=True)]
            figures |= {
                f"bare_pairs_per_s_{num}": statistics.median(bare),
                f"ray_pairs_per_s_{num}": statistics.median(piped),
                f"ray_overhead_{num}": statistics.median(overheads),
                f"ray_overheads_{num}": overheads,
                f"store_peak_mb_{num}": peak / 1e6,
            }
    return figures | {"ray_overhead": figures[f"ray_overhead_{max(rounds)}"]}
