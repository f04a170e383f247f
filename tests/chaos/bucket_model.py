"""A model is trained to a bucket and used from there, on a cluster of two machines whose caches are empty.

    python tests/chaos/bucket_model.py

Training, bulk upscaling, evaluation and the endpoint run as commands of a user, with `s3://runs/mine` (the
directory of the run) or `s3://runs/mine/model` as the model. Claims: each machine downloads the weights once
a command; pixels and figures are those of a copy on disk. An S3 server on loopback counts the downloads; the
machines are processes of this one, each with a cache of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import httpx2
import numpy as np
from PIL import Image
from proxy import Proxy

from resshift import Upscaler, images, seeds, storage
from tests import servers

ROOT = harness.ROOT
RUN = "s3://runs/mine"
TRAINED = ("--set", "train.steps=4", "--set", "train.checkpoint_every=4", "--set", "log.tensorboard=false")


def two_machines(caches: Sequence[Path]) -> Any:
    """Start a cluster of two nodes with three CPUs each: two replicas of two CPUs do not fit on one."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for cache in caches:
        cluster.add_node(
            num_cpus=3,
            num_gpus=0,
            object_store_memory=150 << 20,
            include_dashboard=False,
            env_vars={"RESSHIFT_CACHE": str(cache)},
        )
    return cluster


class Downloads(Proxy):
    """A proxy before the S3 server, which does no harm and counts how often the weights are downloaded."""

    def __init__(self, upstream: int, caches: Sequence[Path]) -> None:
        super().__init__(upstream, argparse.Namespace(slow_down=0, reset=0, cut=0, deny="", seed=0))
        self._caches = caches

    def _forward(self, client: socket.socket, head: bytes, body: bytes, method: bytes, *, cut: bool) -> None:
        if head.startswith(b"GET /runs/mine/model/model.safetensors"):
            self._count("downloads")
        super()._forward(client, head, body, method, cut=cut)

    def begin(self) -> None:
        """Empty the caches and count from here."""
        for cache in self._caches:
            shutil.rmtree(cache, ignore_errors=True)
        self.counts.clear()

    def count(self) -> int:
        """Return how often the weights were downloaded since `begin`."""
        return self.counts["downloads"]

    def listen(self) -> int:
        """Serve in the background and return the port."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self.handle, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        return listener.getsockname()[1]


def command(*arguments: str, check: bool = True) -> str:
    """Run a command of the project and return what it prints."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def make_photos(directory: Path, count: int) -> None:
    """Write pictures of noise."""
    directory.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{i:03d}.png")


def upscaled(up: Upscaler, photo: Path) -> bytes:
    """Return the pixels that a bulk job with seed 0 makes of a photo."""
    seed = seeds.derive(0, "picture", photo.name)
    return np.asarray(up(Image.open(photo), seed=seed)).tobytes()


def main() -> int:
    """Run everything; return the exit code."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="resshift-bucket-model-")))
        caches = [root / "cache-head", root / "cache-node"]
        downloads = Downloads(stack.enter_context(servers.moto(root / "moto.log")), caches)
        port = downloads.listen()
        stack.enter_context(servers.using_store(f"http://127.0.0.1:{port}"))
        for bucket in ("runs", "photos"):
            httpx2.put(f"http://127.0.0.1:{port}/{bucket}")
        os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        cluster = two_machines(caches)
        stack.callback(cluster.shutdown)
        # The driver is a process of the first machine.
        os.environ |= {"RAY_ADDRESS": cluster.address, "RESSHIFT_CACHE": str(caches[0])}
        result: dict[str, Any] = {}

        make_photos(root / "photos", 40)
        shards = str(root / "shards")
        command("jobs/prepare.py", str(root / "photos"), shards)
        command("jobs/train.py", "--preset", "test-x4", "--data", shards, "--out", RUN, *TRAINED)
        local = root / "model"
        local.mkdir()
        for entry in storage.list_entries(f"{RUN}/model"):
            (local / entry.key).write_bytes(storage.read_bytes(entry.uri))
        up = Upscaler.from_pretrained(local, device="cpu")

        photos = sorted((root / "photos").iterdir())[:12]
        truth = root / "truth"
        truth.mkdir()
        for photo in photos:
            storage.write_bytes(f"s3://photos/in/{photo.name}", photo.read_bytes())
            picture = Image.open(photo)
            picture.resize((picture.width * 4, picture.height * 4)).save(truth / photo.name)
            storage.write_bytes(f"s3://photos/gt/{photo.name}", (truth / photo.name).read_bytes())

        downloads.begin()
        two = ("--replicas", "2:2", "--set", "engine.num_cpus=2", "--set", "work.unit_pictures=1")
        command("jobs/upscale.py", "s3://photos/in", "s3://photos/out", "--model", RUN, *two)
        result["upscale_downloads"] = downloads.count()
        result["upscale_caches"] = [len(list((cache / "blobs").glob("*"))) for cache in caches]
        made = {
            photo.name: images.decode(storage.read_bytes(f"s3://photos/out/{photo.stem}_x4.png")).pixels
            for photo in photos
        }
        result["upscale_differences"] = sum(
            made[photo.name].tobytes() != upscaled(up, photo) for photo in photos
        )

        downloads.begin()
        sets = ("--data", "s3://photos/in:s3://photos/gt", "--replicas", "4")
        command("jobs/evaluate.py", "--model", f"{RUN}/model", *sets, "--out", str(root / "there"))
        result["evaluate_downloads"] = downloads.count()
        command("jobs/evaluate.py", "--model", str(local), *sets, "--out", str(root / "here"))
        figures = [
            json.loads((root / name / "summary.json").read_text())["sets"] for name in ("there", "here")
        ]
        result["evaluate_differences"] = int(figures[0] != figures[1])

        downloads.begin()
        port = servers.free_port()
        log_of_server = (root / "serve.log").open("w")
        endpoint = subprocess.Popen(
            [sys.executable, "-m", "serve", "--model", RUN, "--port", str(port), "--replicas", "2:2"],
            cwd=ROOT,
            stdout=log_of_server,
            stderr=log_of_server,
        )
        stack.callback(endpoint.terminate)
        answer = asked(f"http://127.0.0.1:{port}/v1/upscale", photos[0])
        result["serve_downloads"] = downloads.count()
        expected = np.asarray(up(Image.open(photos[0]), seed=0)).tobytes()
        result["serve_differences"] = int(images.decode(answer).pixels.tobytes() != expected)
        endpoint.terminate()
        endpoint.wait(60)

    claims = {
        "one download a machine in the bulk job": result["upscale_downloads"] == 2
        and result["upscale_caches"] == [1, 1],
        "one download a machine in the evaluation": result["evaluate_downloads"] == 2,
        "one download a machine at the endpoint": result["serve_downloads"] == 2,
        "the pixels of a copy on disk": not result["upscale_differences"] and not result["serve_differences"],
        "the figures of a copy on disk": not result["evaluate_differences"],
    }
    return harness.report(result, claims)


def asked(url: str, photo: Path, timeout_s: float = 180) -> bytes:
    """Send a photo until the endpoint answers, and return the picture.

    Raises:
        RuntimeError: it does not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    told = ""
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx2.TransportError):
            response = httpx2.post(
                url, content=photo.read_bytes(), headers={"Content-Type": "image/png"}, timeout=60
            )
            if response.status_code == 200:
                return response.content
            told = response.text
        time.sleep(1)
    raise RuntimeError(f"no picture within {timeout_s:g} s: {told[:500]}")


if __name__ == "__main__":
    sys.exit(main())
