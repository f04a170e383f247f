"""Evaluate with 1 and with 4 replicas, and kill replicas on the way: the report is the same to the byte.

python tests/chaos/evaluation.py [--pictures N] [--kills N] [--model MODEL]
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import harness
import numpy as np

from pipelines.evaluation.evaluate import bicubic_resized


def start(data: str, out: Path, model: str, replicas: int, log: Path) -> subprocess.Popen[bytes]:
    """Start the evaluation in a session of its own."""
    command = [sys.executable, str(harness.ROOT / "jobs" / "evaluate.py"), "--model", model, "--data", data]
    with log.open("ab") as stream:
        return subprocess.Popen(
            [*command, "--out", str(out), "--replicas", str(replicas)],
            cwd=harness.ROOT,
            env=os.environ | harness.ENVIRONMENT,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def replicas_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the processes in which a picture is being evaluated."""
    titles = {pid: harness.title(pid) for pid in harness.descendants(process.pid)}
    return [pid for pid, text in titles.items() if text.startswith("ray::") and "EvaluateStage" in text]


def evaluate(data: str, out: Path, model: str, replicas: int, kills: int, log: Path) -> tuple[int, int]:
    """Run to the end, killing a busy replica every two seconds; return the exit code and how many were
    killed.
    """
    process, killed = start(data, out, model, replicas, log), 0
    try:
        while process.poll() is None:
            time.sleep(2)
            busy = replicas_of(process)
            if killed < kills and busy:
                killed += harness.kill(random.Random(killed).choice(busy))
        return process.returncode, killed
    finally:
        harness.end(process)


def main() -> int:
    """Run and compare."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--pictures", type=int, default=40)
    options.add_argument("--kills", type=int, default=3)
    options.add_argument("--model", default="tiny-x4")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="evaluation-") as temporary:
        work = Path(temporary)
        harness.make_pictures(str(work / "gt"), chosen.pictures, side_px=256)
        for path in sorted((work / "gt").rglob("*.png")):
            picture = np.asarray(cv2.imread(str(path)), np.uint8)[:, :256]
            cv2.imwrite(str(path), picture)
            target = work / "lq" / path.relative_to(work / "gt")
            target.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(target), bicubic_resized(picture, 0.25))
        data, log = f"noise={work / 'lq'}:{work / 'gt'}", work / "job.log"
        runs = {"1 replica": (1, 0), "4 replicas": (4, 0), "4 replicas, killed": (4, chosen.kills)}
        reports: dict[str, bytes] = {}
        killed = codes = 0
        for name, (replicas, kills) in runs.items():
            code, count = evaluate(data, work / name, chosen.model, replicas, kills, log)
            codes, killed = codes + abs(code), killed + count
            reports[name] = (
                (work / name / "summary.json").read_bytes()
                if (work / name / "summary.json").exists()
                else b""
            )
            print(f"{name}: exit {code}, {count} killed, summary.json of {len(reports[name])} bytes")
        if codes:
            print(log.read_text(errors="replace")[-4000:])
    claims = {
        "every run completed": codes == 0,
        "replicas were killed": killed == chosen.kills,
        "reports are the same to the byte": len(set(reports.values())) == 1 and bool(reports["1 replica"]),
    }
    return harness.report({"pictures": chosen.pictures, "killed": killed}, claims)


if __name__ == "__main__":
    sys.exit(main())
