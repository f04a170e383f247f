"""Let replicas of a bulk job hang: they live, and never answer again.

    python tests/chaos/hung.py                  asleep, and in a library with the lock
    python tests/chaos/hung.py --how library

One of two replicas hangs at its tenth picture, once; one picture hangs every replica that takes it. The
first must cost nothing but time, the second is the row of that picture and of no other.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

STEP_S = 10  # engine.step_s: a step of the stand-in takes 0.1 s
POISON, POISON_PX = 33, 200  # its number, and its width, which no other picture has

# Python runs this in every process that starts with its folder in PYTHONPATH.
SITECUSTOMIZE = """
import ctypes, importlib.util, os, sys, time

class Finder:
    def find_spec(self, name, path, target=None):
        if name != "pipelines.bulk.nearest":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            patch(module)
        spec.loader.exec_module = exec_module
        return spec

def patch(module):
    upscale, count = module.Nearest.upscale, [0]
    def hung(self, picture, *rest):
        count[0] += 1
        if picture.width == POISON_PX or (count[0] == 10 and first()):
            print("hangs", flush=True)
            if HOW == "asleep":
                time.sleep(10_000)
            ctypes.PyDLL(None).sleep(10_000)  # with the interpreter's lock
        return upscale(self, picture, *rest)
    module.Nearest.upscale = hung

def first():
    try:
        os.close(os.open(ONCE, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

sys.meta_path.insert(0, Finder())
"""


def hang(work: Path, how: str, count: int) -> tuple[dict[str, Any], dict[str, bool]]:
    """Run a job whose replicas hang; return figures and claims."""
    source, target, calm, log = str(work / "in"), str(work / "out"), str(work / "calm"), work / "job.log"
    harness.make_pictures(source, count)
    harness.make_pictures(str(work / "one"), 1, side_px=POISON_PX)
    poison = Path(source) / "00" / f"{POISON:05d}.png"
    (work / "one" / "00" / "00000.png").rename(poison)
    (work / "sitecustomize").mkdir()
    facts = f"ONCE, HOW, POISON_PX = {str(work / 'once')!r}, {how!r}, {POISON_PX}\n"
    (work / "sitecustomize" / "sitecustomize.py").write_text(facts + SITECUSTOMIZE)
    arguments = ["--model", "nearest-x4@24", "--replicas", "2:2"]
    began = time.monotonic()
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{work / 'sitecustomize'}:{before}"
    code = harness.run(source, target, *arguments, "--set", f"engine.step_s={STEP_S}", log=log)
    wall_s = time.monotonic() - began
    os.environ["PYTHONPATH"] = before
    harness.run(source, calm, "--model", "nearest-x4", "--replicas", "1:1", log=log)
    rows, found, expected = harness.all_rows(target), harness.outputs(target), harness.outputs(calm)
    failed = {row["key"]: row["reason"] for row in rows if row["status"] != "ok"}
    poisoned = str(poison.relative_to(source))
    wrong = sum(found[key] != expected[key] for key in found if key in expected)
    result = {
        "how": how,
        "pictures": count,
        "lost": count - len({row["key"] for row in rows}),
        "duplicate": harness.duplicates(rows),
        "wrong": wrong + len(found.keys() - expected.keys()),
        "failed": failed,
        "hung": log.read_text(errors="replace").count("hangs"),
        "stacks_in_the_log": "Timeout (0:00:" in log.read_text(errors="replace"),
        "wall_s": round(wall_s, 1),
    }
    claims = {
        f"{how}: 0 lost, 0 duplicate, 0 wrong": not (
            result["lost"] or result["duplicate"] or result["wrong"]
        ),
        f"{how}: only the picture that hangs alone is blamed, exit code 3": failed
        == {poisoned: "killed_worker"}
        and code == 3,
        f"{how}: a replica hung for no fault of a picture": (work / "once").exists(),
    }
    if not all(claims.values()):
        print(log.read_text(errors="replace")[-4000:])
        print(next((row["message"] for row in rows if row["status"] != "ok"), ""))
    return result, claims


def main() -> int:
    """Run and count."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--how", choices=["asleep", "library"])
    options.add_argument("--pictures", type=int, default=100)
    chosen = options.parse_args()
    results: list[dict[str, Any]] = []
    claims: dict[str, bool] = {}
    for how in [chosen.how] if chosen.how else ["asleep", "library"]:
        with tempfile.TemporaryDirectory(prefix="hung-") as temporary:
            result, held = hang(Path(temporary), how, chosen.pictures)
        print(json.dumps(result))
        results.append(result)
        claims |= held
    return harness.report({"runs": results}, claims)


if __name__ == "__main__":
    sys.exit(main())
