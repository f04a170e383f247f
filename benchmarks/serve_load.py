"""Measure the endpoint under open-loop load, at 0.5, 1, 2 and 10 times its capacity.

    python benchmarks/serve_load.py [--model nearest-x4@24] [--seconds 20]
    python benchmarks/serve_load.py --quick                                  nothing written
    python benchmarks/serve_load.py --quick --nodes 3 --gateways 4 --replicas 4 --model nearest-x4@4.9

Without --quick it writes benchmarks/results/serve_load-MODEL-DATE-MACHINE.json.

Open loop: requests are sent on schedule whatever happens to earlier ones, as independent visitors do. The
capacity is the rate of as many clients as there are slots, each sending one request after the other. The
stand-in sleeps (24 s per megapixel is 0.1 s for the 64 x 64 picture), as a CPU waits while a GPU works.

    goodput_share_10x   pictures returned per second at 10x, over the capacity
    p99_ratio           99th percentile of the time of answered requests at 10x, over that at 1x
    unexpected_status   requests that end neither with 200 nor with 429 or 503 and Retry-After
    overhead_ms, overhead_ms_64
                        median time of one client with a picture of 64 x 64, minus that of the model
    overhead_ms_512     the same with one of 512 x 512, whose result has 12.6 MB of pixels
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import ray
import record
import scale
import torch
from PIL import Image
from ray import serve

from pipelines.command import connect_to_ray
from serve.__main__ import arguments, configuration, start

SIDE_PX = 64
FACTORS = (0.5, 1.0, 2.0, 10.0)


@dataclass(slots=True)
class Load:
    """Outcomes of the requests of one load; `seconds` has the times of those answered with a picture."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    model_seconds: list[float] = field(default_factory=list)
    num_unexpected: int = 0
    wall_s: float = 0.0

    @property
    def rps(self) -> float:
        return len(self.seconds) / self.wall_s

    @property
    def overhead_ms(self) -> float:
        """Median time without the median time in the model."""
        return 1000 * (self.percentile(50) - float(np.median(self.model_seconds)))

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.seconds, share)) if self.seconds else float("nan")


def picture(side_px: int = SIDE_PX) -> bytes:
    """Return an encoded picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


async def send(session: aiohttp.ClientSession, address: str, data: bytes, load: Load) -> None:
    """Send one request and record its outcome."""
    began = time.perf_counter()
    try:
        async with session.post(f"{address}/v1/upscale", data=data) as answer:
            await answer.read()
            status = answer.status
            load.statuses[str(status)] += 1
            if status == 200:
                load.seconds.append(time.perf_counter() - began)
                phases = dict(part.split(";dur=") for part in answer.headers["Server-Timing"].split(", "))
                load.model_seconds.append(float(phases["model"]) / 1000)
            elif status not in (429, 503) or "Retry-After" not in answer.headers:
                load.num_unexpected += 1
    except (aiohttp.ClientError, TimeoutError) as error:
        load.statuses[type(error).__name__] += 1
        load.num_unexpected += 1


async def closed(
    session: aiohttp.ClientSession, address: str, data: bytes, num_clients: int, seconds: float
) -> Load:
    """Let every client send one request after the other."""
    load, began = Load(), time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - began < seconds:
            await send(session, address, data, load)

    await asyncio.gather(*(client() for _ in range(num_clients)))
    load.wall_s = time.perf_counter() - began
    return load


async def opened(
    session: aiohttp.ClientSession, address: str, data: bytes, rps: float, seconds: float
) -> Load:
    """Send requests at a fixed rate, whatever their outcome. The wall time ends with the sending or with the
    last picture returned, whichever is later.
    """
    load, began, last = Load(), time.perf_counter(), 0.0

    async def one() -> None:
        nonlocal last
        before = len(load.seconds)
        await send(session, address, data, load)
        if len(load.seconds) > before:
            last = time.perf_counter()

    sent: list[asyncio.Task[None]] = []
    for i in range(int(rps * seconds)):
        await asyncio.sleep(max(0.0, began + i / rps - time.perf_counter()))
        sent.append(asyncio.create_task(one()))
    await asyncio.gather(*sent)
    load.wall_s = max(last - began, seconds)
    return load


async def memory_mb(session: aiohttp.ClientSession, address: str) -> float:
    """Return the resident memory of the gateway's process in MB."""
    async with session.get(f"{address}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return next(
        float(line.split()[1]) / 1e6 for line in lines if line.startswith("process_resident_memory_bytes ")
    )


async def measure(
    address: str, seconds: float, num_clients: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Apply all loads to the endpoint, print a line for each, and return the main figures and those of each
    load.
    """
    data = picture()
    timeout = aiohttp.ClientTimeout(total=180)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await closed(session, address, data, 1, min(3.0, seconds))  # decoders start
        single = await closed(session, address, data, 1, seconds / 2)
        large = await closed(session, address, picture(512), 1, seconds)
        capacity = (await closed(session, address, data, num_clients, seconds)).rps
        print(
            f"capacity {capacity:.1f} requests/s with {num_clients} clients; one client p50 "
            f"{1000 * single.percentile(50):.0f} ms"
        )
        loads: dict[float, Load] = {}
        most_mb = await memory_mb(session, address)
        print(f"{'load':>6} {'sent/s':>8} {'good/s':>8} {'p50 ms':>8} {'p99 ms':>8}  statuses")
        for factor in FACTORS:
            load = loads[factor] = await opened(session, address, data, factor * capacity, seconds)
            most_mb = max(most_mb, await memory_mb(session, address))
            times = f"{1000 * load.percentile(50):>8.0f} {1000 * load.percentile(99):>8.0f}"
            print(
                f"{factor:>5g}x {factor * capacity:>8.1f} {load.rps:>8.1f} {times}  "
                f"{dict(sorted(load.statuses.items()))}"
            )
        began = time.perf_counter()
        after = await closed(session, address, data, 1, 0.01)
        recovery_s = time.perf_counter() - began
    by_load = [
        {
            "load": factor,
            "sent_rps": factor * capacity,
            "good_rps": load.rps,
            "p50_s": load.percentile(50),
            "p99_s": load.percentile(99),
            "statuses": dict(load.statuses),
        }
        for factor, load in loads.items()
    ]
    figures = {
        "capacity_rps": capacity,
        "goodput_share_10x": loads[10.0].rps / capacity,
        "unexpected_status": sum(load.num_unexpected for load in loads.values()) + after.num_unexpected,
        "p99_ratio": loads[10.0].percentile(99) / loads[1.0].percentile(99),
        "overhead_ms": single.overhead_ms,
        "overhead_ms_64": single.overhead_ms,
        "overhead_ms_512": large.overhead_ms,
        "recovery_s": recovery_s,
        "gateway_mb": most_mb,
    }
    return figures, by_load


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="nearest-x4@24")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=0, help="simulated nodes beside a head without CPUs")
    parser.add_argument("--seconds", type=float, help="duration of each load (default 20, with --quick 5)")
    chosen = parser.parse_args()
    with scale.head() if chosen.nodes else contextlib.nullcontext() as cluster:
        if cluster is not None:
            for _ in range(chosen.nodes):
                cluster.add_node(num_cpus=4, object_store_memory=256 << 20)
            os.environ["RAY_ADDRESS"] = cluster.address
        connect_to_ray()
        try:
            told, loads = endpoint_figures(chosen)
        finally:
            ray.shutdown()  # a simulated cluster cannot end before
    if not chosen.quick:
        where = record.machine(torch.device("cpu"))
        path = record.RESULTS / record.file_name(f"serve_load-{chosen.model.replace('@', '-')}", where)
        record.write(path, {"machine": where, "figures": told, "loads": loads})
    print(record.json_line({"benchmark": "serve_load", "cores": os.cpu_count()} | told))
    return 0


def endpoint_figures(chosen: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Start the endpoint on the connected Ray, measure it, and end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--model", chosen.model, "--port", str(port), "--replicas", str(chosen.replicas)]
    config = configuration(arguments().parse_args(flags))
    # A queue of half a second: a client that would wait longer is better served elsewhere.
    limits = config["applications"][-1]["args"]["limits"]
    limits |= {"in_flight": chosen.replicas * 2 + 2 * chosen.gateways, "queue": 4 * chosen.gateways}
    config["applications"][-1]["args"]["gateways"] = {"low": chosen.gateways, "high": chosen.gateways}
    address = start(config)
    try:
        figures, loads = asyncio.run(
            measure(address, chosen.seconds or (5 if chosen.quick else 20), limits["in_flight"])
        )
    finally:
        serve.shutdown()
    facts = {name: getattr(chosen, name) for name in ("model", "gateways", "replicas", "nodes")}
    facts |= {"load_average": os.getloadavg()[0]}
    return facts | {name: round(value, 3) for name, value in figures.items()}, loads


if __name__ == "__main__":
    sys.exit(main())
