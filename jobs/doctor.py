"""Check whether this machine, its Ray cluster and its buckets are ready for the work, and say how to fix what
is not.

    python jobs/doctor.py                                     this machine, and the cluster of RAY_ADDRESS
    python jobs/doctor.py --read s3://photos/in s3://out/x4   also access rights: list and get for the first,
                                                              list, put, get and delete for the second
    python jobs/doctor.py s3://out/x4 --set target.endpoint=https://s3.example.org
    ray job submit --working-dir . -- python jobs/doctor.py --nodes s3://out/x4    every node of the cluster

Each line is ok, warn (works, but with limits) or fail (will not work), with the remedy. The command writes
only below URI/_resshift-doctor/ and deletes it again. With --read nothing is written.

Exit codes: 0 complete, nothing failed (warnings are possible), 1 failed, 2 usage, 3 finished with failed
checks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipelines.command import Exit, UsageError, parser, run

_LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "", lambda: "settings: python jobs/upscale.py --help")
    options.add_argument(
        "targets", metavar="URI", nargs="*", help="bucket, prefix or folder that jobs write to"
    )
    options.add_argument(
        "--read",
        metavar="URI",
        action="append",
        default=[],
        help="bucket, prefix or folder that jobs only read; may be repeated",
    )
    options.add_argument(
        "--nodes", action="store_true", help="check every node of the cluster, not only this machine"
    )
    options.add_argument(
        "--lock",
        metavar="FILE",
        help="file of pinned versions to compare with (default: requirements.lock of the repository)",
    )
    options.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="settings source.* and target.*, as for jobs/upscale.py",
    )
    return options


def lock_text(path: str | None) -> str | None:
    """Return the text of the lock file; None if the default one does not exist."""
    if path is None and not _LOCK.exists():
        return None
    try:
        return Path(path or _LOCK).read_text()
    except OSError as error:
        raise UsageError(f"--lock {path}: {error.strerror}") from None


def doctor(options: argparse.Namespace) -> Exit:
    """Run the checks, print and count them."""
    from pipelines.bulk.settings import BulkSettings
    from pipelines.command import connect_to_ray
    from pipelines.doctor.bucket import bucket_checks
    from pipelines.doctor.cluster import node_checks, ray_checks
    from resshift.config import with_settings
    from resshift.doctor.finding import Level
    from resshift.doctor.machine import machine_checks, read_lock

    settings = with_settings(BulkSettings(), options.set)
    lock = lock_text(options.lock)
    try:
        read_lock(lock or "")
    except ValueError as error:
        raise UsageError(f"--lock: {error}") from None

    counts: Counter[Level] = Counter()
    asked = [machine_checks(lock), ray_checks(os.environ)]
    asked += [bucket_checks(uri, settings.source, is_read_only=True) for uri in options.read]
    asked += [bucket_checks(uri, settings.target) for uri in options.targets]
    if options.nodes:
        connect_to_ray()
        asked.append(node_checks(lock))
    for checks in asked:
        for finding in checks:
            counts[finding.level] += 1
            print(finding.line(), flush=True)
    print(f"{counts[Level.OK]} ok, {counts[Level.WARN]} warn, {counts[Level.FAIL]} fail")
    return Exit.FINISHED_WITH_FAILED_ITEMS if counts[Level.FAIL] else Exit.COMPLETE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(doctor, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
