"""A replica that hangs ends itself, also in a library that holds the interpreter's lock."""

from __future__ import annotations

import faulthandler
import subprocess
import sys
import time

import pytest

from pipelines.bulk.wedged import Wedged

_CHILD = """
import ctypes, sys, time
from pipelines.bulk.wedged import Wedged

wedged = Wedged(0.2)
wedged.watch(True)
wedged.watch(False)
time.sleep(2)  # nothing to do is no hang
print("idle", flush=True)
wedged.watch(True)
if sys.argv[1] == "python":
    time.sleep(1000)
ctypes.PyDLL(None).sleep(1000)  # with the interpreter's lock
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["python", "library"])
def test_a_step_that_hangs_ends_the_process_with_its_stacks(where: str) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, where], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (1, "idle\n")
    assert "Timeout (0:00:01" in done.stderr
    assert time.monotonic() - began < 100


def test_the_limit_follows_the_longest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now, armed = [0.0], list[float]()
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: armed.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: armed.append(0.0))
    wedged = Wedged(600, clock=lambda: now[0])
    for _ in range(20):
        wedged.watch(True)
        assert wedged.limit_s == 600
        now[0] += 2
    wedged.watch(True)
    assert wedged.limit_s == 60  # the first steps are over
    now[0] += 30
    wedged.watch(True)
    assert (wedged.limit_s, armed[-1]) == (300, 301)
    started = len(armed)
    for _ in range(100):  # short steps do not start a timer each
        now[0] += 0.001
        wedged.watch(True)
    assert len(armed) == started
    wedged.watch(False)
    assert armed[-1] == 0
