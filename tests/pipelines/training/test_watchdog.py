"""A process that hangs ends itself and says where it was; one that goes on does not."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest


def run(body: str) -> tuple[int, str, float]:
    program = (
        f"import time\nfrom pipelines.training.watchdog import Watchdog\nwatchdog = Watchdog(0.5)\n{body}"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr, time.monotonic() - started


def test_a_step_that_hangs_ends_the_process_with_its_stacks() -> None:
    code, told, seconds = run("def hung_step():\n    time.sleep(600)\nwatchdog.step()\nhung_step()")
    assert code == 1
    assert "Timeout" in told
    assert "in hung_step" in told
    assert seconds < 30


@pytest.mark.slow
def test_steps_in_time_and_a_long_part_do_not_end_it() -> None:
    code, told, _ = run(
        "for _ in range(4):\n    watchdog.step()\n    time.sleep(0.3)\n"
        "watchdog.long()\ntime.sleep(1.0)\nwatchdog.close()\ntime.sleep(1.2)"
    )
    assert (code, told) == (0, "")
