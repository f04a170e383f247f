"""Run the bulk job through a proxy that answers SlowDown, resets connections, cuts bodies short and denies
one object.

python tests/chaos/faulty_s3.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import harness

from resshift import images, storage
from resshift.storage import s3
from tests import servers

DENIED = "00/00003.png"


def main() -> int:
    """Run and count."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true")
    chosen = options.parse_args()
    count = 100 if chosen.quick else 600
    cut = 0.02 if chosen.quick else 0.005
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        work = Path(temporary)
        with (
            servers.moto(work / "moto.log") as upstream,
            servers.using_store(f"http://127.0.0.1:{upstream}"),
        ):
            s3.call(s3.DEFAULT, "create_bucket", Bucket="faulty")
            harness.make_pictures("s3://faulty/in", count)
            port = servers.free_port()
            counts_file = work / "counts.json"
            command = [sys.executable, str(Path(__file__).with_name("proxy.py")), str(port), str(upstream)]
            command += ["--deny", f"/in/{DENIED}", "--cut", str(cut), "--counts", str(counts_file)]
            started = time.monotonic()
            with servers.running(command, port, work / "proxy.log"):
                os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
                arguments = ["--model", "nearest-x4", "--replicas", "2:2"]
                code = harness.run("s3://faulty/in", "s3://faulty/out", *arguments, log=work / "job.log")
            wall = time.monotonic() - started
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{upstream}"
            faults = json.loads(counts_file.read_text())
            rows = harness.all_rows("s3://faulty/out")
            wrong = 0
            for row in rows:
                if row["status"] == "ok":
                    source = images.decode(storage.read_bytes(f"s3://faulty/in/{row['key']}")).pixels
                    written = images.decode(storage.read_bytes(f"s3://faulty/out/{row['output']}")).pixels
                    wrong += not (written == source.repeat(4, axis=0).repeat(4, axis=1)).all()
            verified = harness.run("s3://faulty/in", "s3://faulty/out", "--verify", log=work / "job.log")
        if code != 3:
            print((work / "job.log").read_text(errors="replace")[-5000:])
    statuses = Counter((row["status"], row["reason"]) for row in rows)
    result = {
        "objects": count,
        "faults": faults,
        "rows": {f"{status} {reason or ''}".strip(): number for (status, reason), number in statuses.items()},
        "lost": count - len({row["key"] for row in rows}),
        "wrong_outputs": wrong,
        "requests_per_object": round(faults["requests"] / count, 2),
        "wall_s": round(wall, 1),
    }
    claims = {
        "0 lost": not result["lost"] and not harness.duplicates(rows),
        "0 wrong bytes": wrong == 0 and verified == 3,
        "the 403 is one failed row with its reason": statuses["failed", "denied"] == 1
        and statuses["ok", ""] == count - 1,
        "every kind of fault happened": all(
            faults.get(name, 0) > 0 for name in ("slow_down", "reset", "cut", "denied")
        ),
        "exit code 3": code == 3,
    }
    return harness.report(result, claims)


if __name__ == "__main__":
    sys.exit(main())
