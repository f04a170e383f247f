"""Behaviour when memory is short: fewer tiles in a call, smaller tiles, windows in files.

The memory that happens to be free never decides the tiles, because tiles decide the pixels and a retry
elsewhere must give the same. It decides where the windows between the stages live, which changes nothing.
Only when memory has run out are tiles made smaller, and then the result says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from resshift.tiles.plan import TilePlan
from resshift.tiles.window import Allocate, in_file, in_memory

# Latent positions of a call, and most tiles of one. Calls are filled up, so a picture that shares its shape
# with no other pays for all of them: no more than a GPU should compute in about the time of one. Not measured
# on CUDA yet.
_CALL_POSITIONS, _MOST_TILES = 2**14, 4


def tiles_per_call(area: int) -> int:
    """Return how many tiles of `area` latent positions a GPU computes at a time; a function of the tile
    alone, because it decides rounding.
    """
    return max(1, min(_MOST_TILES, _CALL_POSITIONS // area))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory has run out, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device; on the CPU within this process's control group too. None
    when it cannot be found out.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current")
        )
        return min(free, int(limit) - int(used)) if limit != "max" else free
    except (OSError, ValueError):
        return free


def place_windows(num_bytes: int, device: torch.device) -> Allocate:
    """Return where windows of so many bytes live: on the device if they take at most half of what is free
    there, else in files; in files too where nobody knows what is free.
    """
    free = free_bytes(device)
    return in_memory(device) if free is not None and num_bytes <= free // 2 else in_file


@dataclass
class Backoff:
    """What running out of memory has taught about one model.

    Fields:
        limit_by_shape: Largest number of tiles in a call that worked, by the shape of a tile.
        longest: Longest side of a tile that may be tried, in latent positions; None: any.
    """

    limit_by_shape: dict[tuple[int, ...], int] = field(default_factory=dict)
    longest: int | None = None

    def call(self, function: Callable[..., Tensor], *tiles: Tensor) -> Tensor:
        """Return function(*tiles), in halves when memory runs out for the whole batch.

        Raises:
            Exception: What the function raised when memory ran out for a single tile.
        """
        shape = tuple(tiles[0].shape[1:])
        while True:
            size = min(self.limit_by_shape.get(shape, len(tiles[0])), len(tiles[0]))
            try:
                parts = [
                    function(*(tile[i : i + size] for tile in tiles)) for i in range(0, len(tiles[0]), size)
                ]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except Exception as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            _empty_cache(tiles[0].device)
            self.limit_by_shape[shape] = size // 2

    def shrink(self, plan: TilePlan, multiple: int, device: torch.device) -> bool:
        """Halve the longest side after memory ran out for a single tile of `plan`; False when the tiles were
        the smallest already.
        """
        side = max(plan.rows.tile, plan.columns.tile)
        # Pictures that share calls run out of memory together: only the first of them halves.
        if self.longest is None or side <= self.longest:
            if side == multiple:
                return False
            self.longest = max(multiple, side // 2 // multiple * multiple)
        _empty_cache(device)
        return True


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
