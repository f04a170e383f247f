"""CPU time of a child is counted, as that of its kind."""

from __future__ import annotations

import subprocess
import sys

from tests.scripts import load_script

cpu_time = load_script("benchmarks/cpu_time.py")


def test_time_is_told_apart_by_what_processes_are_called() -> None:
    script = "import time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True)\ninput()"
    before = cpu_time.cpu_by_kind()
    with subprocess.Popen(
        ["ray::ReadPairs", "-c", script],
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "done\n"
        spent = cpu_time.since(before)
        child.communicate("\n")
    assert spent["tasks"] >= 0.4
    assert before["driver"] > 0
