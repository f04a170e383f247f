"""Run the whole job from bucket to bucket on OpenStack Swift: upscale, resume, retry, verify.

python tests/chaos/real_store.py [--pictures 60]         starts tests/chaos/swift.sh (Debian packages, root)
python tests/chaos/real_store.py --endpoint URL          another store; credentials from the environment
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path

import harness

from resshift import images, storage
from resshift.storage import s3
from tests import servers


def main() -> int:
    """Run and compare."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--pictures", type=int, default=60)
    options.add_argument("--endpoint")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="store-") as temporary, contextlib.ExitStack() as stack:
        work = Path(temporary)
        endpoint = chosen.endpoint
        if endpoint is None:
            port = servers.free_port()
            script = str(Path(__file__).with_name("swift.sh"))
            stack.enter_context(
                servers.running(
                    [script, str(port), str(work / "swift")], port, work / "swift.log", timeout_s=300
                )
            )
            endpoint = f"http://127.0.0.1:{port}"
            stack.enter_context(servers.using_store(endpoint, "test:tester", "testing"))
            time.sleep(2)  # the proxy listens a moment before the servers behind it
        else:
            os.environ["AWS_ENDPOINT_URL"] = endpoint
        bucket = f"resshift-{uuid.uuid4().hex[:8]}"
        s3.call(s3.DEFAULT, "create_bucket", Bucket=bucket)
        source, target = f"s3://{bucket}/in", f"s3://{bucket}/out"
        harness.make_pictures(source, chosen.pictures)
        storage.write_bytes(f"{source}/odd name ✓ +&.png", storage.read_bytes(f"{source}/00/00000.png"))
        storage.write_bytes(f"{source}/broken.jpg", b"not a picture")
        arguments = ["--model", "nearest-x4", "--replicas", "2:2"]
        started = time.monotonic()
        codes = {
            "first half": harness.run(source, target, *arguments, "--include", "00/*", log=work / "job.log")
        }
        codes["all"] = harness.run(source, target, *arguments, log=work / "job.log")
        codes["again"] = harness.run(source, target, *arguments, log=work / "job.log")
        storage.write_bytes(
            f"{source}/broken.jpg", storage.read_bytes(f"{source}/00/00001.png")
        )  # repaired by its owner
        codes["retry"] = harness.run(source, target, *arguments, "--retry-failed", log=work / "job.log")
        codes["verify"] = harness.run(source, target, "--verify", log=work / "job.log")
        wall = time.monotonic() - started
        rows = harness.all_rows(target)
        wrong = 0
        for row in rows:
            if row["status"] == "ok":
                original = images.decode(storage.read_bytes(f"{source}/{row['key']}")).pixels
                written = images.decode(storage.read_bytes(f"{target}/{row['output']}")).pixels
                wrong += not (written == original.repeat(4, axis=0).repeat(4, axis=1)).all()
        reports = {
            name: storage.exists(f"{target}/_resshift/report.{name}") for name in ("html", "json", "csv")
        }
        text = (work / "job.log").read_text(errors="replace")
        if codes["verify"]:
            print(text[-5000:])
    statuses = Counter(row["status"] for row in rows)
    result = {
        "pictures": chosen.pictures,
        "codes": codes,
        "rows": dict(statuses),
        "wrong_outputs": wrong,
        "wall_s": round(wall, 1),
    }
    claims = {
        "exit codes": codes == {"first half": 0, "all": 3, "again": 3, "retry": 0, "verify": 0},
        "every object has its output": len({row["key"] for row in rows if row["status"] == "ok"})
        == chosen.pictures + 2,
        "0 duplicate rows": harness.duplicates([row for row in rows if row["key"] != "broken.jpg"]) == 0,
        "0 wrong outputs": wrong == 0,
        "the report is there": all(reports.values()),
    }
    return harness.report(result, claims)


if __name__ == "__main__":
    sys.exit(main())
