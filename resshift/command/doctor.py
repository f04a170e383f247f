"""Check whether this machine is ready to upscale pictures, and say how to fix what is not.

    resshift doctor

Each line is ok, warn (works, but with limits) or fail (will not work), with the remedy. For Ray, clusters and
buckets there is python jobs/doctor.py of the repository.

Exit codes: 0 nothing failed, 3 something did.
"""

from __future__ import annotations

import argparse

from resshift.command import Exit


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """There are none."""


def run(options: argparse.Namespace) -> Exit:
    """Run the checks and print them."""
    from resshift.doctor.finding import Level
    from resshift.doctor.machine import local_checks

    findings = []
    for finding in local_checks():
        findings.append(finding)
        print(finding.line(), flush=True)
    has_failed = any(finding.level is Level.FAIL for finding in findings)
    return Exit.FINISHED_WITH_FAILED_ITEMS if has_failed else Exit.COMPLETE
