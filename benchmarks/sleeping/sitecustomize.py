"""Makes pairs that sleep in every process of a simulated cluster: Python runs this file when a process starts
whose PYTHONPATH names this folder. Such pairs need none of the machine's cores, so that it can simulate more
CPUs than it has. Each process that makes pairs counts them in a file of eight bytes in the folder that the
variable PAIRS_COUNTED names.

torch is never imported: it would cost each of a hundred processes two seconds and half a gigabyte.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass
class TrainingPair:
    """As that of `resshift.pairs.training_pair`, as far as tasks use it."""

    hq_u8: Any
    lq_u8: Any
    mask_u8: None = None


class SleepingPairs:
    """Makes a pair in `seconds`, neither more nor less on average: what one sleep took too long, the next is
    shorter. Time between two pairs is never caught up.
    """

    def __init__(self, seconds: float, counts: Path) -> None:
        self._seconds, self._debt = seconds, 0.0
        self._counts, self._made = counts, 0
        self._file: mmap.mmap | None = None

    def __call__(self, data: bytes, key: str, epoch: int, seed: int, crop: Any, recipe: Any) -> TrainingPair:
        import numpy as np

        if self._file is None:  # most processes make no pairs
            begun = self._counts.with_name(f"begun-{os.getpid()}")
            begun.write_bytes(bytes(8))
            with begun.open("r+b") as file:
                self._file = mmap.mmap(file.fileno(), 8)
            begun.rename(self._counts / str(os.getpid()))  # whoever finds it finds eight bytes
        wanted = max(0.0, self._seconds - self._debt)
        started = time.perf_counter()
        time.sleep(wanted)
        self._debt += time.perf_counter() - started - self._seconds
        self._made += 1
        self._file[:] = struct.pack("q", self._made)
        shade, px = zlib.crc32(f"{key} {epoch} {seed}".encode()) % 256, crop.crop_px
        small = px // recipe.scale
        return TrainingPair(
            np.full((px, px, 3), shade, np.uint8), np.full((small, small, 3), shade, np.uint8)
        )


class _Anything:
    """Stands for whatever a module takes from a stand-in when it is imported."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __call__(self, *values: Any, **_: object) -> Any:
        return values[0] if values else None


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (_Anything,), {})
        setattr(self, name, made)
        return made


if "PAIRS_COUNTED" in os.environ:
    torch, nn, functional = modules = tuple[Any, ...](
        _StandIn(f"torch{name}") for name in ("", ".nn", ".nn.functional")
    )
    torch.nn, nn.functional = nn, functional
    pairs: Any = _StandIn("resshift.pairs.training_pair")
    pairs.TrainingPair = TrainingPair
    pairs.make_pair = SleepingPairs(float(os.environ["PAIR_SECONDS"]), Path(os.environ["PAIRS_COUNTED"]))
    sys.modules |= {module.__name__: module for module in (*modules, pairs)}
