"""Measure training pairs per second of the Ray Data pipeline, compared with the same number of bare
processes that only call the function.

Both are timed in turn by wall time, on the same photos. The overhead is the share of the processes' rate that
the pipeline does not reach: reading shards, starting tasks, moving pairs through the object store, ordering,
and the consumer. Start-up is excluded.

CPU time a pair is told beside it, by what spends it: on a machine that runs other programs, it is what can
be compared.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cpu_time
import ray

from pipelines.cluster import ray_internals
from pipelines.command import quiet_ray_data
from pipelines.pairs.dataset import rows_per_task, task_sizes
from pipelines.pairs.ranks import PairStream, rank_batches
from pipelines.pairs.share import left_by_workers
from pipelines.shards.build import ShardOptions
from pipelines.shards.prepare import prepare_here
from resshift.allocator import keep_freed_pages
from resshift.config import DataConfig
from resshift.devices import use_one_thread
from resshift.pairs.training_pair import make_pair
from resshift.presets import preset

_STORE_BYTES = 2 << 30  # Ray's default would be 30 % of the machine's memory
_START_S = 30.0  # until the daemons and agents of a cluster have started and finished their imports
_BATCH = 64
_CORES = 2
# A block arrives every half second; polling five times a second took 0.01 of a core here, and more in Ray's
# daemons.
_WATCH_S = 1.0


class Rate(NamedTuple):
    """What was measured of one way to make pairs.

    Fields:
        pairs_per_s: Of all cores together.
        cpu_ms: CPU milliseconds a pair, by the kinds of `cpu_time`.
        store_bytes: Peak of the object store.
    """

    pairs_per_s: float
    cpu_ms: dict[str, float]
    store_bytes: int = 0


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
    keep_freed_pages()  # as a task does
    for key, data in photos[:32]:
        make_pair(data, key, 0, 0, crop, recipe)  # fills tables, plans and caches, as a worker does once
    start.wait()
    began, cpu, count = time.monotonic(), time.process_time(), 0
    while (taken := time.monotonic() - began) < seconds:
        key, data = photos[(first + count) % len(photos)]
        make_pair(data, key, count // len(photos), 0, crop, recipe)
        count += 1
    out.put((count / taken, (time.process_time() - cpu) / max(1, count)))


def bare_rate(
    photos: Sequence[tuple[str, bytes]], crop: DataConfig, num_processes: int, seconds: float
) -> Rate:
    """Measure `num_processes` together, each calling only `make_pair`."""
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
    rates, cpu = zip(*(out.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    return Rate(sum(rates), {"function": 1e3 * statistics.mean(cpu)})


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


def ray_rate(root: str, crop: DataConfig, num_cpus: int, seconds: float) -> Rate:
    """Measure the pairs that are made for a consumer of `rank_batches`.

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
        began, count, stored, cpu = time.monotonic(), 0, -store_bytes(), cpu_time.cpu_by_kind()
        while (taken := time.monotonic() - began) < seconds:
            count += take_until_waited(batches)
        stored += store_bytes()
        spent = cpu_time.since(cpu)
        batches.close()
        count += stored / (3 * (crop.crop_px**2 + (crop.crop_px // config.degradation.scale) ** 2))
        cpu_ms = {kind: 1e3 * seconds / max(1, count) for kind, seconds in spent.items()}
        return Rate(count / taken, cpu_ms, peak.num_bytes)
    finally:
        stop.set()
        watcher.join()
        ray.shutdown()


def measure_pipeline(
    photos: Sequence[tuple[str, bytes]], crop: DataConfig, seconds: float, num_rounds: int
) -> dict[str, Any]:
    """Time both on two cores in turn and return the figures.

    Rates and overheads are medians over the rounds: two rates are comparable only if one is measured directly
    after the other.

    Args:
        photos: Key and encoded bytes of each photo.
        crop: How training crops are cut.
        seconds: Duration of each measurement.
        num_rounds: How often each is measured.
    """
    with tempfile.TemporaryDirectory(prefix="pairs-") as temporary:
        source, root = Path(temporary) / "photos", str(Path(temporary) / "shards")
        source.mkdir()
        for i, (_, data) in enumerate(photos):
            (source / f"{i:05d}.jpg").write_bytes(data)
        # Row groups have the same size as in shards of ImageNet.
        prepare_here(str(source), root, ShardOptions())
        bare, piped = list[Rate](), list[Rate]()
        for _ in range(num_rounds):
            bare.append(bare_rate(photos, crop, _CORES, seconds))
            piped.append(ray_rate(root, crop, _CORES, seconds))
    overheads = [1 - ray.pairs_per_s / alone.pairs_per_s for ray, alone in zip(piped, bare, strict=True)]
    alone_ms = statistics.median(rate.cpu_ms["function"] for rate in bare)
    cpu_ms = {kind: statistics.median(rate.cpu_ms[kind] for rate in piped) for kind in cpu_time.KINDS}
    return {
        "store_limit_mb": _STORE_BYTES / 1e6,
        "bare_pairs_per_s_2": statistics.median(rate.pairs_per_s for rate in bare),
        "ray_pairs_per_s_2": statistics.median(rate.pairs_per_s for rate in piped),
        "ray_overhead": statistics.median(overheads),
        "ray_overheads_2": overheads,
        "bare_cpu_ms_2": alone_ms,
        "ray_cpu_ms_2": cpu_ms,
        "ray_cpu_overhead_2": 1 - alone_ms / sum(cpu_ms.values()),
        "store_peak_mb_2": max(rate.store_bytes for rate in piped) / 1e6,
    }
