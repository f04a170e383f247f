"""How much memory upscaling takes, and what to do with less.

A tile's networks take bytes in proportion to its area: `bytes_alive` measures them once a model, by running
one small tile and counting the tensors that are alive. `plan_for` chooses tiles: the largest that cost little
more than the cheapest, within a budget if there is one.

Only a budget and the picture decide the tiles, never the memory that happens to be free: tiles decide the
pixels, and a retry elsewhere must give the same. What is free decides only where the windows between the
stages live, which changes nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resshift.tiles.plan import TilePlan, plan_tiles

# Longest side of a tile when nobody says, in latent positions: beyond, tiles save little work and cost
# memory.
DEFAULT_SIDE = 256
# Neighbours share an eighth of a tile: what both have seen of each other is what hides the border.
OVERLAP_SHARE = 8
# Larger tiles are worth this much more work than the cheapest plan: they hold more context.
_WORTH = 1.2
# Latent positions of a call, and most tiles of one. Calls are filled up, so a picture whose shape nobody
# shares pays for all of them: no more than a GPU should compute in about the time of one. Not measured on
# CUDA yet.
_CALL_POSITIONS, _MOST_TILES = 2**14, 4
# What the counted tensors leave out: workspaces of kernels, the allocator's rounding, bands of rows on their
# way in and out.
_MARGIN, _FIXED_BYTES = 1.25, 48 * 2**20


class MemoryBudgetError(ValueError):
    """Not even the smallest tile fits into the budget; the message says what would."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes: bytes for each latent position of a tile, and latent positions at which attention
    costs as much as all else.
    """

    bytes_per_position: float
    attention_positions: float = float("inf")

    def tile_bytes(self, area: int) -> int:
        """Bytes while a tile of `area` positions is computed."""
        return int(self.bytes_per_position * area * _MARGIN) + _FIXED_BYTES


def plan_for(
    size: tuple[int, int],
    multiple: int,
    *,
    attention_positions: float = float("inf"),
    largest: int = DEFAULT_SIDE,
    fits: Callable[[int], bool] = lambda area: True,
) -> TilePlan | None:
    """Return the tiles of a latent plane, or None when none fits.

    The cost of a plan is the positions it computes, overlap and extension included, times 1 + area /
    attention_positions. Taken is the plan with the largest tiles that costs at most a fifth more than the
    cheapest.

    Args:
        size: height and width of the plane.
        multiple: of the sides of a tile.
        attention_positions: area at which global attention costs as much as everything else.
        largest: side of the largest tile.
        fits: whether a tile of that many positions may be used.
    """
    sides = range(multiple, max(largest, multiple) + 1, multiple)
    plans = [
        plan
        for plan in (plan_tiles(*size, side, side // OVERLAP_SHARE, multiple) for side in sides)
        if fits(plan.tile_area)
    ]
    if not plans:
        return None
    costs = [plan.num_tiles * plan.tile_area * (1 + plan.tile_area / attention_positions) for plan in plans]
    allowed = min(costs) * _WORTH
    return max(
        (plan for plan, cost in zip(plans, costs, strict=True) if cost <= allowed),
        key=lambda plan: plan.tile_area,
    )


def tiles_per_call(area: int, fits: Callable[[int], bool] = lambda area: True) -> int:
    """Return how many tiles of `area` positions a GPU computes at a time; a function of tile and budget
    alone, because it decides rounding.

    Args:
        area: of one tile.
        fits: whether so many positions may be computed at a time.
    """
    return max(
        n for n in range(1, max(1, min(_MOST_TILES, _CALL_POSITIONS // area)) + 1) if n == 1 or fits(n * area)
    )


class _Alive(TorchDispatchMode):
    """Count the bytes of tensors made inside and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if (
                isinstance(leaf, Tensor)
                and (storage := leaf.untyped_storage()) not in self._seen
                and storage not in inputs
            ):
                self._seen.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return out

    def _change(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


def bytes_alive(call: Callable[[], object]) -> int:
    """Run `call` and return the most bytes of tensors that it made and that were alive at one time."""
    with _Alive() as counted:
        call()
    return counted.peak


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


@dataclass
class Backoff:
    """Call a function on a batch of tiles; when memory runs out, in halves, and remember the size that worked
    for this shape.
    """

    limit_by_shape: dict[tuple[int, ...], int] = field(default_factory=dict)

    def call(self, function: Callable[..., Tensor], *tiles: Tensor) -> Tensor:
        """Return function(*tiles).

        Raises:
            Exception: what the function raised when memory ran out for a single tile.
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
            if tiles[0].device.type == "cuda":
                torch.cuda.empty_cache()
            self.limit_by_shape[shape] = size // 2
