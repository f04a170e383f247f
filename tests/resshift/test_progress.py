"""What a command shows while it works, in a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from resshift.progress import Progress, Rate, line, shown

Clock = Callable[[float], None]


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let seconds go by on the clock of rates."""
    now = [100.0]
    monkeypatch.setattr("resshift.progress.time.monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def plain(console: Console) -> str:
    """Return what a terminal was sent, without colours and movements of the cursor."""
    written = console.file.getvalue()  # type: ignore[attr-defined]
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written)


def test_rates_look_back_a_minute(wait: Clock) -> None:
    rate, found = Rate(), 0.0
    for second in range(200):
        found = rate.update(2.0 * second + (100 if second > 100 else 0))
        wait(1)
    assert found == pytest.approx(2.0)


def test_rate_and_time_left_are_those_of_inputs_that_do_not_fail(wait: Clock) -> None:
    progress = Progress("pictures", 100)
    progress.before = 20
    assert progress.snapshot()["eta_s"] is None
    wait(10)
    progress.add("failed", 15)
    assert (progress.snapshot()["pictures_per_s"], progress.snapshot()["eta_s"]) == (0.0, None)
    progress.add("ok", 20)
    progress.add("skipped", 5)
    state = progress.snapshot()
    assert (state["pictures_per_s"], state["eta_s"]) == (2.0, 20)  # 100 - 20 - 40 are left
    progress.is_listed = False
    assert progress.snapshot()["eta_s"] is None


def test_a_log_gets_json_lines() -> None:
    console = Console(file=io.StringIO())
    with shown(Progress("tars", 5), console, every_s=0.02) as progress:
        progress.add("ok", 3)
        time.sleep(0.2)
        progress.add("failed")
    states: list[dict[str, Any]] = [json.loads(text) for text in plain(console).splitlines()]
    assert len(states) >= 2
    assert list(states[-1]) == [
        *("time", "done", "failed", "skipped", "before", "listed", "is_listed", "tars_per_s", "eta_s")
    ]
    assert (states[-1]["done"], states[-1]["failed"], states[-1]["listed"]) == (3, 1, 5)


def test_the_last_state_is_told_when_the_work_fails() -> None:
    console = Console(file=io.StringIO())

    def work() -> None:
        with shown(Progress("pictures", 5), console) as progress:
            progress.add("ok", 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert json.loads(plain(console))["done"] == 2


def test_a_terminal_gets_a_bar_and_what_is_printed_stands_above_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("test_progress")
    logger.addHandler(handler)
    try:
        with shown(Progress("pictures", 5), console) as progress:
            progress.add("ok", 3)
            progress.add("failed")
            time.sleep(0.6)  # the bar is on the screen
            sys.stderr.write("(actor) a line of a worker\n")
            logger.warning("a line of the log")
        assert handler.stream is sys.stderr
    finally:
        logger.removeHandler(handler)
    rows = [row.strip() for row in re.split(r"[\r\n]+", plain(console))]
    assert "(actor) a line of a worker" in rows
    assert "a line of the log" in rows
    assert re.fullmatch(r"pictures [━╸╺ ]+ 4/5  ETA 0:00:0\d  \d+\.\d\d/s  1 failed", rows[-2]), rows
    assert capsys.readouterr().err == ""


def test_the_bar_of_a_job_tells_everything() -> None:
    state = {
        **{"done": 1200, "failed": 3, "skipped": 0, "before": 100, "listed": 5000, "is_listed": False},
        **{"pictures_per_s": 14.2, "eta_s": 3725, "megapixels_per_s": 0.98, "replicas": 2},
    }
    assert line("pictures", state) == (
        "1203/4900+  ETA 1:02:05  14.20/s  3 failed  0.98 megapixels/s  2 replicas"
    )


def test_a_job_without_a_replica_says_what_it_waits_for() -> None:
    state = {
        **{"done": 0, "failed": 0, "skipped": 0, "before": 0, "listed": 5, "is_listed": True},
        **{"pictures_per_s": 0.0, "eta_s": None, "replicas": 0},
    }
    assert line("pictures", state) == "0/5  0.00/s  starting a replica"


def test_the_share_of_the_picture_under_way_moves_the_time_left(wait: Clock) -> None:
    progress = Progress("pictures", 3)
    progress.snapshot()
    wait(10)
    progress.share = 0.5
    state = progress.snapshot()
    assert (state["share"], state["pictures_per_s"], state["eta_s"]) == (0.5, 0.05, 50)
    assert line("pictures", state).startswith("0/3  50% of the next  ETA 0:00:50")
    progress.add("ok")
    assert "share" not in progress.snapshot()
