"""How far the work of a command has come: a bar in a terminal, JSON lines elsewhere.

    {"time": 1764028800.0, "done": 1200, "failed": 3, "skipped": 0, "before": 0, "listed": 5000,
     "is_listed": true, "pictures_per_s": 14.2, "eta_s": 267}

`Progress` counts and knows nothing of a display; `shown` displays it on standard error.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

_WINDOW_S = 60.0
_SHOWN_PER_S = 4
_STATUSES = ("ok", "failed", "skipped")


class Rate:
    """Growth of a total per second over the last minute."""

    def __init__(self) -> None:
        self._points = deque([(time.monotonic(), 0.0)])
        self._lock = threading.Lock()

    def update(self, total: float) -> float:
        """Note the total of now and return its growth per second."""
        now = time.monotonic()
        with self._lock:
            if len(self._points) > 1 and now - self._points[-2][0] < 1 / _SHOWN_PER_S:
                self._points.pop()
            self._points.append((now, total))
            while len(self._points) > 2 and now - self._points[0][0] > _WINDOW_S:
                self._points.popleft()
            first, before = self._points[0]
        return (total - before) / max(now - first, 1e-9)


class Progress:
    """Counts of what a command works on.

    Failed and skipped inputs often take no time. They count as worked on but not in the rate, so the time
    that is left is that of inputs none of which fails.

    Args:
        what: What is counted, for example "pictures".
        listed: Number of inputs.

    Fields:
        is_listed: Whether `listed` is the number of all inputs.
        before: Number of inputs that an earlier run has done.
        counts: Number of inputs of this run by status: "ok", "failed" or "skipped".
        share: Share of the input under way that is done; where several are, the sum.
    """

    def __init__(self, what: str, listed: int = 0) -> None:
        self.what, self.listed = what, listed
        self.is_listed = True
        self.before = 0
        self.counts: Counter[str] = Counter()
        self.share = 0.0
        self._rate = Rate()

    def add(self, status: str, num: int = 1) -> None:
        """Count inputs whose work has ended."""
        self.share = 0.0
        self.counts[status] += num

    def snapshot(self) -> Mapping[str, Any]:
        """Return the state that is shown; `eta_s` is None until it can be told."""
        share = self.share
        # A picture that fails takes its share back.
        per_s = max(0.0, self._rate.update(self.counts["ok"] + share))
        num_left = self.listed - self.before - sum(self.counts[status] for status in _STATUSES) - share
        state: dict[str, Any] = {
            "time": round(time.time(), 1),
            "done": self.counts["ok"],
            "failed": self.counts["failed"],
            "skipped": self.counts["skipped"],
            "before": self.before,
            "listed": self.listed,
            "is_listed": self.is_listed,
            f"{self.what}_per_s": round(per_s, 2),
            "eta_s": max(0, round(num_left / per_s)) if self.is_listed and per_s > 0 else None,
        }
        return state | ({"share": round(share, 3)} if share else {})


P = TypeVar("P", bound=Progress)
_Show: TypeAlias = Callable[[Mapping[str, Any]], None]


@contextmanager
def shown(progress: P, console: Console | None = None, every_s: float = 10.0) -> Generator[P]:
    """Show a progress until the block ends, and then its last state.

    Args:
        progress: What is counted in the block.
        console: Where it is shown: a bar in a terminal, else JSON lines. Standard error by default.
        every_s: Seconds between two JSON lines.
    """
    console = console or Console(stderr=True)
    display, period_s = (_bar, 1 / _SHOWN_PER_S) if console.is_terminal else (_lines, every_s)
    ended = threading.Event()
    with display(progress.what, console) as show:

        def keep_showing() -> None:
            while not ended.wait(period_s):
                show(progress.snapshot())

        thread = threading.Thread(target=keep_showing, name="progress", daemon=True)
        thread.start()
        try:
            yield progress
        finally:
            ended.set()
            thread.join()
            show(progress.snapshot())


@contextmanager
def _lines(what: str, console: Console) -> Generator[_Show]:
    def show(state: Mapping[str, Any]) -> None:
        console.file.write(json.dumps(state) + "\n")
        console.file.flush()

    yield show


@contextmanager
def _bar(what: str, console: Console) -> Generator[_Show]:
    columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[text]}"))
    before = sys.stderr
    # Rich takes what is printed, by Ray too, and writes it above the bar. What goes to a file is left alone.
    bar = Bar(*columns, console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())
    with bar, _logs_follow(before):
        task = bar.add_task(what, total=None, text="")

        def show(state: Mapping[str, Any]) -> None:
            num, total = _worked_on(state)
            total = total if state["is_listed"] else None
            bar.update(
                task, completed=num + state.get("share", 0), total=total, text=line(what, state), refresh=True
            )

        yield show


@contextmanager
def _logs_follow(before: object) -> Generator[None]:
    """Let the log handlers that wrote to this standard error write to the one of now."""
    loggers = [logging.root, *(one for one in logging.root.manager.loggerDict.values())]
    found = [
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in (before, sys.__stderr__)
    ]
    replaced = [(handler, handler.setStream(sys.stderr)) for handler in found]
    try:
        yield
    finally:
        for handler, stream in replaced:
            handler.setStream(stream)


def _worked_on(state: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many inputs were worked on, and how many were to be."""
    return state["done"] + state["failed"] + state["skipped"], state["listed"] - state["before"]


def line(what: str, state: Mapping[str, Any]) -> str:
    """Return what stands beside the bar."""
    num, total = _worked_on(state)
    parts = [f"{num}/{total}{'' if state['is_listed'] else '+'}"]
    if share := state.get("share"):
        parts.append(f"{share:.0%} of the next" if share < 1 else f"{share:.1f} of the next ones")
    if (eta_s := state["eta_s"]) is not None:
        parts.append(f"ETA {eta_s // 3600}:{eta_s // 60 % 60:02d}:{eta_s % 60:02d}")
    parts.append(f"{_rate(state[f'{what}_per_s'])}/s")
    parts += [f"{state[status]} {status}" for status in ("failed", "skipped") if state[status]]
    others = state.keys() - {f"{what}_per_s"}
    rates = sorted(name for name in others if name.endswith("_per_s"))
    parts += [f"{_rate(state[name])} {name.removesuffix('_per_s')}/s" for name in rates]
    if "replicas" in state:
        number = state["replicas"]
        parts.append(f"{number} replica{'s' * (number != 1)}" if number else "starting a replica")
    return "  ".join(parts)


def _rate(per_s: float) -> str:
    return f"{per_s:.2f}" if per_s >= 0.1 or not per_s else f"{per_s:.1g}"
