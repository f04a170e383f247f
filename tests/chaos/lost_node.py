"""Kill a node with half of a job's replicas while a few hundred pictures are under way.

    python tests/chaos/lost_node.py                     256 pictures of one second, two nodes of four replicas
    python tests/chaos/lost_node.py --pictures 32 --replicas 2

The nodes are processes of this machine, and the model is the stand-in, which sleeps. Nobody is charged for a
lost node: its pictures are done by the other one, as fast as that can.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import faults
import harness

PICTURE_S = 1.0


def lose(work: Path, count: int, replicas: int) -> tuple[dict[str, Any], dict[str, bool]]:
    """Run the job, and kill a node when a tenth of it is done; return figures and claims."""
    from ray.cluster_utils import Cluster

    source, target, calm, log = str(work / "in"), str(work / "out"), str(work / "calm"), work / "job.log"
    harness.make_pictures(source, count)
    faults.ray_environment()
    os.environ |= harness.ENVIRONMENT
    store = 150 << 20
    head = {"num_cpus": 4, "num_gpus": 0, "object_store_memory": store}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [
        cluster.add_node(num_cpus=replicas + 1, num_gpus=replicas, object_store_memory=store)
        for _ in range(2)
    ]
    os.environ["RAY_ADDRESS"] = str(cluster.address)
    model = f"nearest-x4@{PICTURE_S / 64**2 * 1e6:.0f}"
    process = harness.start(
        source, target, "--model", model, "--replicas", f"{2 * replicas}:{2 * replicas}", log=log
    )
    try:
        while len(list(Path(target).glob("*/*.png"))) < count // 10:
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            time.sleep(0.2)
        done = len(list(Path(target).glob("*/*.png")))
        killed = time.monotonic()
        cluster.remove_node(nodes[-1], allow_graceful=False)
        code = process.wait(1200)
        wall_s = time.monotonic() - killed
    finally:
        harness.end(process)
        del os.environ["RAY_ADDRESS"]
        cluster.shutdown()
    harness.run(source, calm, "--model", "nearest-x4", "--replicas", "1:1", log=log)
    rows, found, expected = harness.all_rows(target), harness.outputs(target), harness.outputs(calm)
    result = {
        "pictures": count,
        "replicas": [2 * replicas, replicas],
        "done_before": done,
        "seconds_after": round(wall_s, 1),
        "seconds_of_work": round((count - done) * PICTURE_S / replicas, 1),
        "failed": sum(row["status"] != "ok" for row in rows),
        "lost": count - len({row["key"] for row in rows}),
        "duplicate": harness.duplicates(rows),
        "wrong": sum(found.get(key) != digest for key, digest in expected.items()),
        "most_attempts": max((row["attempts"] for row in rows), default=0),
    }
    claims = {
        "0 lost, 0 duplicate, 0 wrong": not (result["lost"] or result["duplicate"] or result["wrong"]),
        "nobody is charged: exit code 0, no failed row": code == 0 and not result["failed"],
    }
    if not all(claims.values()):
        print(log.read_text(errors="replace")[-4000:])
    return result, claims


def main() -> int:
    """Run and count."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--pictures", type=int, default=256)
    options.add_argument("--replicas", type=int, default=4, help="of each of the two nodes")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="lost-node-") as temporary:
        return harness.report(*lose(Path(temporary), chosen.pictures, chosen.replicas))


if __name__ == "__main__":
    sys.exit(main())
