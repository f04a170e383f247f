"""Mix broken and exotic files with good ones and check every row against what a manifest expects.

    python tests/chaos/malformed.py malformed.tar

The archive holds MANIFEST.json: {"files": [{"path", "category", "expect"}]}, `expect` one of decode,
decode_or_refuse, refuse_or_partial, refuse, refuse_too_large, large_ok_or_refuse. Without an archive (the
test suite) the script makes a small one of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import harness
import numpy as np
from PIL import Image

REFUSALS = {
    "empty",
    "not_an_image",
    "unsupported_format",
    "unsupported_mode",
    "truncated",
    "corrupt",
    "too_large",
}
ALLOWED = {
    "decode": {"ok"},
    "decode_or_refuse": {"ok"} | REFUSALS,
    "refuse_or_partial": {"ok"} | REFUSALS,
    "refuse": REFUSALS,
    "refuse_too_large": {"too_large"},
    "large_ok_or_refuse": {"ok", "too_large"},
}


def own_archive(path: Path) -> None:
    """Write a small archive of the same form."""
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(picture, "PNG")
    png = picture.getvalue()
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    files = {
        "fine.png": (png, "decode"),
        "cut.png": (png[:-400], "refuse"),
        "zeros.png": (png[:200] + bytes(400) + png[600:], "refuse_or_partial"),
        "empty.jpg": (b"", "refuse"),
        "page.jpg": (b"<html>not found</html>", "refuse"),
        "bomb.png": (bomb.getvalue(), "refuse_too_large"),
        "odd name ✓.png": (png, "decode"),
    }
    manifest = {
        "files": [
            {"path": f"files/{name}", "category": "own", "expect": expect}
            for name, (_, expect) in files.items()
        ]
    }
    contents = {"MANIFEST.json": json.dumps(manifest).encode()} | {
        f"files/{name}": data for name, (data, _) in files.items()
    }
    with tarfile.open(path, "w") as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def expected_files(archive: Path, target: Path) -> list[dict[str, Any]]:
    """Unpack an archive and return the entries of its manifest."""
    with tarfile.open(archive) as opened:
        opened.extractall(target, filter="data")
    return json.loads((target / "MANIFEST.json").read_text())["files"]


def main() -> int:
    """Run and compare."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("archive", nargs="?")
    options.add_argument("--good", type=int, default=100)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="malformed-") as temporary:
        work = Path(temporary)
        archive = Path(chosen.archive) if chosen.archive else work / "own.tar"
        if not chosen.archive:
            own_archive(archive)
        files = expected_files(archive, work / "in")
        harness.make_pictures(str(work / "in" / "good"), chosen.good)
        # What an archive cannot hold: things that are no files at all.
        os.mkfifo(work / "in" / "pipe.png")
        (work / "in" / "loop.png").symlink_to("loop.png")
        (work / "in" / "folder.png").mkdir()
        arguments = ["--model", "nearest-x4", "--replicas", "2:2", "--exclude", "MANIFEST.json"]
        arguments += ["--name", "{dir}/{name}.{ext}"]  # nothing collides
        started = time.monotonic()
        code = harness.run(str(work / "in"), str(work / "out"), *arguments, log=work / "job.log")
        wall = time.monotonic() - started
        rows = {row["key"]: row for row in harness.all_rows(str(work / "out"))}
        everything = harness.all_rows(str(work / "out"))
        text = (work / "job.log").read_text(errors="replace")
        verified = harness.run(str(work / "in"), str(work / "out"), "--verify", log=work / "verify.log")
        verify_text = (work / "verify.log").read_text(errors="replace")

    wrong: list[str] = []
    by_expectation: dict[str, Counter[str]] = defaultdict(Counter)
    for file in files:
        row = rows.get(file["path"])
        outcome = "no row" if row is None else "ok" if row["status"] == "ok" else str(row["reason"])
        by_expectation[file["expect"]][outcome] += 1
        if outcome not in ALLOWED[file["expect"]]:
            wrong.append(f"{file['path']}: {file['expect']}, but {outcome}: {row and row['message']}")
    for expect, outcomes in sorted(by_expectation.items()):
        print(f"{expect:20} {dict(outcomes.most_common())}")
    for line in wrong:
        print("  " + line)
    good = [row for key, row in rows.items() if key.startswith("good/")]
    result = {
        "files": len(files),
        "good": len(good),
        "outcomes": {expect: dict(outcomes) for expect, outcomes in by_expectation.items()},
        "wrong": len(wrong),
        "killed_worker": sum(row["reason"] in ("killed_worker", "timeout") for row in rows.values()),
        "wall_s": round(wall, 1),
    }
    claims = {
        "every file has one row": all(file["path"] in rows for file in files)
        and not harness.duplicates(everything),
        "every row has the class of reason that is expected": not wrong,
        "0 crashes": result["killed_worker"] == 0 and code == 3 and "Traceback" not in text,
        "good ones are all there": len(good) == chosen.good and all(row["status"] == "ok" for row in good),
        "what is no file is said to be none": {rows[name]["reason"] for name in ("pipe.png", "loop.png")}
        == {"irregular"},
        "outputs are as recorded": verified == 3 and "0 outputs differ" in verify_text,
    }
    if code != 3:
        print(text[-4000:])
    return harness.report(result, claims)


if __name__ == "__main__":
    sys.exit(main())
