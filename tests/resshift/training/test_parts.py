"""Parts of sharded tensors, with the meshes of many workers in one process: the fake process group of torch
sends nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from resshift.models import WeightsError
from resshift.training import parts
from resshift.training.parts import Parts, Place

# Rows that four workers cannot share evenly: 2, 2, 1 and none; and fewer rows than workers.
WHOLE = {
    "weight": torch.arange(5 * 3, dtype=torch.float32).reshape(5, 3),
    "bias": torch.arange(8.0),
    "gain": torch.tensor([0.5]),
    "buffer": torch.tensor([7, 8, 9]),  # not sharded
    "count": torch.tensor(3.0),  # not sharded, and without rows
}


@contextlib.contextmanager
def worker(
    rank: int, shape: tuple[int, ...], whole: dict[str, Tensor] = WHOLE
) -> Generator[dict[str, Tensor]]:
    """Be a worker of a mesh, (ranks,) or (nodes, ranks of a node), and hold its tensors."""
    dist.init_process_group("fake", rank=rank, world_size=torch.Size(shape).numel(), store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", shape)
        cut = [*[Replicate()] * (len(shape) - 1), Shard(0)]
        yield {
            name: value
            if name in ("buffer", "count")
            else distribute_tensor(value.clone(), mesh, cut, src_data_rank=None)
            for name, value in whole.items()
        }
    finally:
        dist.destroy_process_group()


def save(directory: Path, shape: tuple[int, ...], whole: dict[str, Tensor] = WHOLE) -> Parts:
    """Write the parts of all workers of the first replica and open them."""
    directory.mkdir()
    for rank in range(shape[-1]):
        with worker(rank, shape, whole) as tensors:
            sharded = next(value for value in tensors.values() if isinstance(value, DTensor))
            place = parts.place_of(sharded)
            assert place == Place(rank, shape[-1], 0)
            parts.write(directory / f"{rank}.safetensors", parts.held(tensors, place))
    return Parts(directory.glob("*.safetensors"))


@pytest.mark.parametrize(("writers", "readers"), [((4,), (2,)), ((2,), (4,)), ((2, 2), (3,)), ((1,), (2, 4))])
def test_any_number_of_workers_reads_what_any_number_wrote(
    writers: tuple[int, ...], readers: tuple[int, ...], tmp_path: Path
) -> None:
    found = save(tmp_path / "parts", writers)
    for rank in range(torch.Size(readers).numel()):
        with worker(rank, readers) as tensors:
            found.check(tensors)
            for name, value in tensors.items():
                assert torch.equal(found.read(name, value), parts.local(value)), (rank, name)
    found.check(WHOLE)  # a process that shards nothing
    assert all(torch.equal(found.read(name, value), value) for name, value in WHOLE.items())


def test_each_row_is_written_once(tmp_path: Path) -> None:
    save(tmp_path / "parts", (4,))
    tensor_bytes = sum(value.numel() * value.element_size() for value in WHOLE.values())
    headers = files = 0
    for path in (tmp_path / "parts").iterdir():
        content = path.read_bytes()
        headers += 8 + int.from_bytes(content[:8], "little")
        files += len(content)
    assert files - headers == tensor_bytes


def test_replicas_hold_the_same_part() -> None:
    places: list[Place] = []
    for rank in range(4):
        with worker(rank, (2, 2)) as tensors:
            weight = tensors["weight"]
            assert isinstance(weight, DTensor)
            places.append(parts.place_of(weight))
    assert places == [Place(0, 2, 0), Place(1, 2, 0), Place(0, 2, 1), Place(1, 2, 1)]


def test_part_becomes_a_sharded_tensor_again() -> None:
    with worker(1, (4,)) as tensors:
        weight = tensors["weight"]
        again = parts.like(parts.local(weight), weight)
        assert isinstance(again, DTensor)
        assert again.shape == (5, 3)
        assert torch.equal(again.to_local(), WHOLE["weight"][2:4])
        assert parts.rows_of(weight) == (2, 4)


def test_what_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    found = save(tmp_path / "parts", (4,))
    with pytest.raises(WeightsError, match="gain is no tensor of this run"):
        found.check({name: value for name, value in WHOLE.items() if name != "gain"})
    with pytest.raises(WeightsError, match="other is missing"):
        found.check({**WHOLE, "other": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"weight has the shape \(5, 3\) in the files instead of \(6, 3\)"):
        found.check({**WHOLE, "weight": torch.zeros(6, 3)})
    (tmp_path / "parts" / "1.safetensors").unlink()  # rows 2 and 3 of the weight
    with pytest.raises(WeightsError, match="weight has the shape"):
        Parts((tmp_path / "parts").glob("*")).check(WHOLE)
    (tmp_path / "parts" / "0.safetensors").write_bytes(b"\x10")
    with pytest.raises(WeightsError, match=r"0\.safetensors cannot be read"):
        Parts((tmp_path / "parts").glob("*"))
