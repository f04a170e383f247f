"""Measure the busy share of replicas under the two engines of the bulk job, with a stand-in model of known
time.

    python benchmarks/engines.py [--quick] [--replicas 2] [--milliseconds 100]

The stand-in sleeps, as a CPU waits while a GPU works. The pictures are 128 x 128, so a unit of 8 is 3 MB of
results. The busy share is the time in the model divided by the wall time between a replica's first unit and
its last result; start-up is excluded. `ideal` is the number of replicas divided by the time per picture.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import ray

from pipelines.bulk.actors import ActorEngine
from pipelines.bulk.engine import Engine, EngineOptions
from pipelines.bulk.scheduler import BulkOptions, BulkRun, busy_share
from pipelines.bulk.selection import Worklist
from pipelines.bulk.stages import StageOptions, UpscaleOptions
from pipelines.bulk.sweep import Inputs
from pipelines.command import connect_to_ray
from pipelines.ledger.digests import DigestSet, OwnerMap
from pipelines.ledger.ledger import Known, Row
from serve.engine import ServeEngine

SIDE_PX = 128


def measure(kind: str, source: str, target: str, milliseconds: float, replicas: int) -> dict[str, float]:
    """Run the job without a ledger and return its figures."""
    model = f"nearest-x4@{milliseconds / 1000 / (SIDE_PX**2 / 1e6):.4f}"
    job = UpscaleOptions(model=model, identity="nearest-x4", scale=4)
    options = EngineOptions(model=model, identity="nearest-x4", low=replicas, high=replicas)
    engine: Engine = ServeEngine(options) if kind == "serve" else ActorEngine(options)
    rows: list[Row] = []

    async def run() -> BulkRun:
        worklist = Worklist(
            Inputs(source=source).entries(), Known(DigestSet(), OwnerMap(), Counter()), job.output_key, 4
        )
        resources = ray.cluster_resources()
        bulk = BulkRun(
            worklist.batches(),
            StageOptions(outputs=job, target=target),
            engine,
            BulkOptions(),
            rows.extend,
            num_cpus=int(resources["CPU"]),
            object_store_bytes=int(resources["object_store_memory"]),
        )
        await engine.start()
        while engine.num_replicas < replicas:
            await asyncio.sleep(0.1)
        await bulk.run()
        await engine.close()
        return bulk

    bulk = asyncio.run(run())
    times = list(bulk.replica_times.values())
    wall = max(one.last for one in times) - min(one.first for one in times)
    assert all(row["status"] == "ok" for row in rows)
    return {
        "busy_share": round(busy_share(times) or 0.0, 4),
        "pictures_per_s": round(len(rows) / wall, 1),
        "ideal_pictures_per_s": round(replicas / (milliseconds / 1000), 1),
        "replicas": len(times),
    }


def main() -> int:
    """Measure both engines, twice each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--milliseconds", type=float, default=100)
    parser.add_argument("--engine", choices=["actors", "serve"], help="measure only this engine")
    chosen = parser.parse_args()
    count = chosen.pictures or (200 if chosen.quick else 600)
    connect_to_ray(num_cpus=chosen.replicas + 4)
    result: dict[str, object] = {"pictures": count, "milliseconds": chosen.milliseconds}
    with tempfile.TemporaryDirectory(prefix="engines-") as temporary:
        work = Path(temporary)
        (work / "in").mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (SIDE_PX, SIDE_PX, 3), np.uint8)
            (work / "in" / f"{i:05d}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        print(f"{'engine':8} {'busy':>7} {'img/s':>8} {'ideal':>8}")
        for kind in (chosen.engine,) if chosen.engine else ("actors", "serve"):
            best: dict[str, float] = {}
            for turn in range(1 if chosen.quick else 2):
                figures = measure(
                    kind,
                    str(work / "in"),
                    str(work / f"out-{kind}-{turn}"),
                    chosen.milliseconds,
                    chosen.replicas,
                )
                print(
                    f"{kind:8} {100 * figures['busy_share']:6.1f}% {figures['pictures_per_s']:8.1f} "
                    f"{figures['ideal_pictures_per_s']:8.1f}",
                    flush=True,
                )
                best = max(best, figures, key=lambda one: one.get("busy_share", 0.0))
                time.sleep(1)
            result[kind] = best
    ray.shutdown()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
