"""Parts of the tensors of a sharded state: what one worker holds, as a file, and what any worker needs, read
from the files of all.

FSDP2 cuts a tensor along its first axis. The file of a worker holds its rows, and in its metadata the first
of them for each tensor; a reader asks for the rows of its own, however many workers wrote, and reads only
those.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from resshift.models import WeightsError
from resshift.weights import save_safetensors

_STARTS = "first_rows"


@dataclass(frozen=True, slots=True)
class Place:
    """Place of this worker among those that hold different parts; `replica` counts the holders of the same
    one.
    """

    index: int
    count: int
    replica: int


def place_of(value: DTensor) -> Place:
    """Return which part of a tensor that FSDP2 or HSDP sharded this worker has."""
    mesh = value.device_mesh
    axis = mesh.ndim - 1  # the axes before it replicate
    return Place(mesh.get_local_rank(axis), mesh.size(axis), mesh.get_local_rank(0) if axis else 0)


def rows_of(value: Tensor) -> tuple[int, int]:
    """Return the rows [start, stop) of a tensor that this worker holds: all of one that is not sharded."""
    if not isinstance(value, DTensor):
        return 0, value.shape[0] if value.ndim else 1
    place, num_rows = place_of(value), value.shape[0]
    size = -(-num_rows // place.count)
    return min(place.index * size, num_rows), min((place.index + 1) * size, num_rows)


def local(value: Tensor) -> Tensor:
    """Return this worker's rows; they share memory with the tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def like(part: Tensor, value: Tensor) -> Tensor:
    """Return this worker's rows as a tensor that is sharded as `value`."""
    part = part.to(value.device)
    if not isinstance(value, DTensor):
        return part
    return DTensor.from_local(
        part, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


class Held(NamedTuple):
    """A copy of a worker's rows of one tensor, on the CPU, and the first of them."""

    rows: Tensor
    start: int


def held(tensors: Mapping[str, Tensor], place: Place) -> dict[str, Held]:
    """Copy what a worker has to write: its rows of sharded tensors, and of the others the first worker
    everything.
    """
    return {
        name: Held(local(value).detach().to("cpu", copy=True).contiguous(), rows_of(value)[0])
        for name, value in tensors.items()
        if isinstance(value, DTensor) or place.index == 0
    }


def write(path: Path, parts: Mapping[str, Held]) -> None:
    """Write the parts of one worker."""
    starts = json.dumps({name: part.start for name, part in parts.items()})
    save_safetensors({name: part.rows for name, part in parts.items()}, path, {_STARTS: starts})


class Parts:
    """Tensors in the files of all workers, read as rows. Also a file of whole tensors.

    Raises:
        WeightsError: A file cannot be read.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._found: dict[str, list[tuple[int, int, Any]]] = {}  # first and last row, and the open file
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(paths):
            try:
                file: Any = safe_open(path, "pt")
                starts = json.loads((file.metadata() or {}).get(_STARTS, "{}"))
                for name in file.keys():  # noqa: SIM118  # not a dict
                    shape = tuple(file.get_slice(name).get_shape())
                    start = starts.get(name, 0)
                    self._found.setdefault(name, []).append((start, start + (shape or (1,))[0], file))
                    self._shapes[name] = shape
            except (OSError, SafetensorError, ValueError) as error:
                raise WeightsError(f"{path} cannot be read: {error}") from error
        for found in self._found.values():
            found.sort(key=lambda one: one[:2])

    def names(self, prefix: str = "") -> list[str]:
        """Return the names that begin so."""
        return [name for name in self._found if name.startswith(prefix)]

    def check(self, wanted: Mapping[str, Tensor]) -> None:
        """Check that these tensors are in the files, each with its shape, without a gap, and no others.

        Raises:
            WeightsError: They are not; the message names the first that differs.
        """
        for name in sorted(wanted.keys() ^ self._found.keys()):
            raise WeightsError(f"{name} is {'no tensor of this run' if name in self._found else 'missing'}")
        for name, value in wanted.items():
            row = 0
            for start, stop, _ in self._found[name]:
                row = stop if start <= row else -1
            shape = (row, *self._shapes[name][1:]) if value.ndim else self._shapes[name]
            if shape != tuple(value.shape):
                raise WeightsError(
                    f"{name} has the shape {shape} in the files instead of {tuple(value.shape)}"
                )

    def read(self, name: str, value: Tensor) -> Tensor:
        """Return the rows of a tensor that this worker holds of `value`."""
        if not value.ndim:
            return self._found[name][0][2].get_tensor(name)
        start, stop = rows_of(value)
        pieces = [
            file.get_slice(name)[max(start, first) - first : min(stop, last) - first]
            for first, last, file in self._found[name]
            if first < stop and start < last
        ]
        if not pieces:
            return torch.empty((0, *value.shape[1:]), dtype=value.dtype)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
