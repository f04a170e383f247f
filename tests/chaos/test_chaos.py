"""Short versions of the chaos scripts, each a process with a Ray of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(
    not os.environ.get("RESSHIFT_CHAOS"), reason="takes minutes and starts Rays of its own: RESSHIFT_CHAOS=1"
)
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "script",
    [
        ["kills.py", "--quick", "--pictures", "60"],
        ["malformed.py", "--good", "12"],
        ["faulty_s3.py", "--quick"],
        ["cluster.py", "--quick"],
    ],
    ids=lambda script: script[0],
)
def test_chaos(script: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / script[0]), *script[1:]],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["passed"]
