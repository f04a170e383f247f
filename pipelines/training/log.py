"""Figures of a run while it trains: one line in the log, JSON lines in OUT/metrics, and TensorBoard.

Only the first worker writes. Lines wait in memory until the next checkpoint and become
OUT/metrics/step-N.jsonl just before it exists, so metrics and checkpoints agree after any restart;
TensorBoard is written at once, and a restart purges what it will write again.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from resshift import storage
from resshift.config import LogConfig

logger = logging.getLogger(__name__)


class Clock:
    """Time of the steps since the last line, and how much of it was spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._started = time.perf_counter()
        self._waited_s = 0.0
        self._steps = 0

    def step(self, waited_s: float) -> None:
        """Count a step and the seconds that it waited for its batch."""
        self._waited_s += waited_s
        self._steps += 1

    def read(self, batch_size: int, num_ranks: int) -> dict[str, float]:
        """Return it_per_s, images_per_s, images_per_s_worker and data_wait (a share) since `restart`."""
        elapsed_s = max(time.perf_counter() - self._started, 1e-9)
        rate = self._steps / elapsed_s
        return {
            "it_per_s": rate,
            "images_per_s": rate * batch_size,
            "images_per_s_worker": rate * batch_size / num_ranks,
            "data_wait": self._waited_s / elapsed_s,
        }


def memory_gib(device: torch.device) -> float:
    """Return the largest memory held so far: on the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    resource: Any = importlib.import_module("resource")  # not on Windows, where Ray Train does not run either
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def log_line(line: Mapping[str, float], num_steps: int) -> str:
    """Return a line as `step=100/4000 loss=0.0123 ... it/s=1.50 img/s/worker=24.0 data_wait=3% mem=12.3GiB
    eta=0:43:20`.
    """
    hidden = {"step", "lr", "grad_norm", "skipped", "workers", "window", "memory_gib", "data_wait"}
    left_s = round((num_steps - line["step"]) / max(line["it_per_s"], 1e-9))
    parts = [f"step={line['step']:.0f}/{num_steps}"]
    parts += [
        f"{name}={value:.5g}"
        for name, value in line.items()
        if name not in hidden and not name.startswith(("it_per_s", "images_per_s"))
    ]
    parts += [f"lr={line['lr']:.2e}", f"grad_norm={line['grad_norm']:.3g}", f"it/s={line['it_per_s']:.3g}"]
    parts += [f"img/s/worker={line['images_per_s_worker']:.3g}", f"data_wait={line['data_wait']:.0%}"]
    parts += [
        f"mem={line['memory_gib']:.1f}GiB",
        f"eta={left_s // 3600}:{left_s % 3600 // 60:02}:{left_s % 60:02}",
    ]
    return " ".join(parts + ([f"skipped={line['skipped']:.0f}"] if line["skipped"] else []))


class TensorBoard:
    """Event files in OUT/tensorboard; for S3 they are written locally and copied at every checkpoint.

    Args:
        out: Run directory.
        step: Step that the run continues from; a restart removes what was shown beyond it.
    """

    def __init__(self, out: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._target = storage.join(out, "tensorboard") if storage.is_s3(out) else None
        self._temporary = (
            tempfile.TemporaryDirectory(prefix="resshift-tensorboard-") if self._target else None
        )
        self.directory = Path(self._temporary.name if self._temporary else os.path.join(out, "tensorboard"))
        self._writer = SummaryWriter(str(self.directory), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, rgb_u8: NDArray[np.uint8]) -> None:
        self._writer.add_image(name, rgb_u8, step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()
        if self._target:
            for path in self.directory.iterdir():
                storage.write_bytes(storage.join(self._target, path.name), path.read_bytes())

    def close(self) -> None:
        self.flush()
        self._writer.close()
        if self._temporary:
            self._temporary.cleanup()


@dataclass(slots=True)
class _Waiting:
    metrics: list[dict[str, Any]]
    validation: list[dict[str, Any]]


class TrainLog:
    """The first worker's log.

    Args:
        out: Run directory.
        log: Setting that turns TensorBoard on.
        step: Step that the run continues from.
        num_steps: Number of steps of the run.
    """

    def __init__(self, out: str, log: LogConfig, step: int, num_steps: int) -> None:
        self.out = out
        self.num_steps = num_steps
        self._waiting = _Waiting([], [])
        forget_after(out, step)
        self._board = TensorBoard(out, step) if log.tensorboard else None

    def steps(self, line: dict[str, float]) -> None:
        """Log the means since the last line."""
        logger.info("%s", log_line(line, self.num_steps))
        self._waiting.metrics.append(line)
        if self._board is not None:
            self._board.scalars(
                int(line["step"]), {f"train/{name}": value for name, value in line.items() if name != "step"}
            )

    def validation(
        self, step: int, means: Mapping[str, float], grid_u8: NDArray[np.uint8] | None, png: bytes | None
    ) -> None:
        """Log a validation, and store its grid as OUT/samples/step-N.png."""
        logger.info(
            "validation step=%d %s", step, " ".join(f"{name}={value:.4f}" for name, value in means.items())
        )
        self._waiting.validation.append({"step": step, **means})
        if png is not None:
            storage.write_bytes(storage.join(self.out, f"samples/step-{step:08d}.png"), png)
        if self._board is not None:
            self._board.scalars(step, {f"validation/{name}": value for name, value in means.items()})
            if grid_u8 is not None:
                self._board.picture(step, "validation/lq, result, truth", grid_u8)

    def commit(self, step: int) -> Callable[[], None]:
        """Return a function that stores the lines so far, to run before the checkpoint of `step` exists."""
        waiting, self._waiting = self._waiting, _Waiting([], [])

        def store() -> None:
            for folder, lines in (("metrics", waiting.metrics), ("validation", waiting.validation)):
                if lines:
                    text = "".join(json.dumps(line) + "\n" for line in lines)
                    storage.write_bytes(
                        storage.join(self.out, f"{folder}/step-{step:08d}.jsonl"), text.encode()
                    )
            if self._board is not None:
                self._board.flush()

        return store

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def forget_after(out: str, step: int) -> None:
    """Remove lines beyond the checkpoint that the run continues from: their steps are repeated."""
    for folder in ("metrics", "validation"):
        for name, found in lines_of(out, folder):
            if found > step:
                storage.remove(storage.join(out, name))


def lines_of(out: str, folder: str) -> list[tuple[str, int]]:
    """Return (key below `out`, step) of the stored files of "metrics" or "validation", in order."""
    pattern = re.compile(rf"{folder}/step-(\d+)\.jsonl")
    try:
        found = [
            (entry.key, int(match[1]))
            for entry in storage.list_entries(out)
            if (match := pattern.fullmatch(entry.key))
        ]
    except storage.StorageError as error:
        if error.reason is storage.StorageReason.MISSING:
            return []
        raise
    return sorted(found, key=lambda item: item[1])


def read_lines(out: str, folder: str = "metrics") -> list[dict[str, Any]]:
    """Return the stored lines of a run in the order of their steps."""
    texts = [storage.read_bytes(storage.join(out, name)).decode() for name, _ in lines_of(out, folder)]
    return [json.loads(line) for text in texts for line in text.splitlines()]
