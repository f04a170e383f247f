"""Shards -> training pairs on CPUs: read, decode, crop, degrade; uint8 columns.

What a pair is depends on (seed, epoch, key) alone; where it stands in the stream on (seed, row number) alone (`pipelines.epoch`).

Columns of a batch: hq (H, W, 3) and lq (H / scale, W / scale, 3) uint8; mask (H, W) uint8, 255 in a hole, with inpainting only; key; epoch;
row, its number in the stream; substituted, 1 when the picture could not be decoded any more and its neighbour stands in, so that no other
pair moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipelines.epoch import RowGroup, Window, row_groups, stream
from pipelines.imagenet import read_manifest
from resshift import degradation, storage
from resshift.config import DataConfig, RunConfig
from resshift.images import ImageError
from resshift.pair import Pair, make_pair, use_one_thread

Batch = dict[str, NDArray[Any]]


def make_pairs(batch: Batch, seed: int, crop: DataConfig, recipe: degradation.DegradationRecipe) -> Batch:
    """Turn rows of the reader (key, bytes, epoch, row) into pairs; see the module docstring for the columns.

    Raises:
        ImageError: not one picture of the batch can be decoded.
    """
    use_one_thread()
    made: list[Pair | None] = []
    failure: ImageError | None = None
    for data, key, epoch in zip(batch["bytes"], batch["key"], batch["epoch"], strict=True):
        try:
            made.append(make_pair(data, str(key), int(epoch), seed, crop, recipe))
        except ImageError as error:
            failure = error
            made.append(None)
    good = [i for i, pair in enumerate(made) if pair is not None]
    if not good:
        raise failure or ValueError("an empty batch has no pairs")
    source = [i if made[i] is not None else min(good, key=lambda j, i=i: abs(j - i)) for i in range(len(made))]
    pairs = [pair for i in source if (pair := made[i]) is not None]
    masks = [pair.mask_u8 for pair in pairs if pair.mask_u8 is not None]
    return {
        "hq": np.stack([pair.hq_u8 for pair in pairs]),
        "lq": np.stack([pair.lq_u8 for pair in pairs]),
        **({"mask": np.stack(masks)} if masks else {}),
        "key": batch["key"],
        "epoch": batch["epoch"],
        "row": batch["row"],
        "substituted": np.array([int(made[i] is None) for i in range(len(made))], dtype=np.uint8),
    }


def read_window(root: str, window: Window) -> pa.Table:
    """Read the rows of a window in stream order: key, bytes, epoch, row. Only the row groups it names are fetched."""
    tables = [_read_group(root, group) for group in window.groups]
    table = pa.concat_tables(tables).take(pa.array(window.order, pa.int64()))
    rows = np.arange(window.first_row, window.first_row + len(window.order))
    return table.append_column("epoch", pa.array(np.full(len(rows), window.epoch))).append_column("row", pa.array(rows))


def _read_group(root: str, group: RowGroup) -> pa.Table:
    with storage.open_input(storage.join(root, group.shard)) as file:
        table = pq.ParquetFile(file).read_row_group(group.index, columns=["key", "bytes", "status"])
    return table.filter(pc.field("status") == "ok").drop_columns(["status"])


class PairSource(Datasource):
    """The stream as a Ray Data source.

    Every execution (one `iter_torch_batches` loop) covers the next `rows_per_execution` rows, so a run is a few long executions instead of
    one an epoch: starting an execution costs a second or more.

    Args:
        root: directory or prefix of the shards.
        groups: of all shards.
        seed: of the run.
        start_row: first row of the first execution.
        rows_per_execution: length of each.
    """

    def __init__(self, root: str, groups: Sequence[RowGroup], seed: int, start_row: int, rows_per_execution: int) -> None:
        super().__init__()
        self.root = root
        self.groups = tuple(groups)
        self.seed = seed
        self.start_row = start_row
        self.rows_per_execution = rows_per_execution

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: rows are encoded pictures of any size."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: ray.data.DataContext | None = None
    ) -> list[ReadTask]:
        """Return one task a window; Ray calls this at every execution."""
        # Ray counts executions of a dataset in a private field (2.60); tests/pipelines/test_pairs.py notices if that changes.
        i_execution = data_context._execution_idx if data_context is not None else 0  # pyright: ignore[reportPrivateUsage]
        start = self.start_row + i_execution * self.rows_per_execution
        windows = stream(self.groups, self.seed, start, start + self.rows_per_execution)
        return [_read_task(self.root, window) for window in windows]


def _read_task(root: str, window: Window) -> ReadTask:
    def read() -> Iterable[pa.Table]:
        return [read_window(root, window)]

    return ReadTask(read, BlockMetadata(num_rows=len(window.order), size_bytes=None, exec_stats=None, input_files=None))


def pair_dataset(root: str, config: RunConfig, start_row: int = 0, rows_per_execution: int | None = None) -> ray.data.Dataset:
    """Return the dataset of training pairs from stream row `start_row` on.

    Args:
        root: directory or prefix that `jobs/prepare.py` wrote.
        config: of the run.
        start_row: rows that the run has consumed already.
        rows_per_execution: default `default_rows_per_execution`.
    """
    groups = row_groups(read_manifest(root))
    rows = rows_per_execution or default_rows_per_execution(config)
    source = PairSource(root, groups, config.train.seed, start_row, rows)
    num_tasks = sum(1 for _ in stream(groups, config.train.seed, start_row, start_row + rows))
    # Asking for more blocks than there are tasks would split each into single rows (Ray 2.60).
    dataset = ray.data.read_datasource(source, override_num_blocks=num_tasks)
    dataset.context.enable_progress_bars = False  # workers have no terminal: bars would fill the log
    stage: Any = make_pairs  # Ray's types do not know functions with keyword arguments
    return dataset.map_batches(
        stage, batch_size=None, fn_kwargs={"seed": config.train.seed, "crop": config.data, "recipe": config.degradation}
    )


def default_rows_per_execution(config: RunConfig) -> int:
    """Return the largest whole number of global batches within 32 768 rows (at least one batch): no batch straddles two executions."""
    return config.train.batch_size * max(1, min(config.train.steps, 32_768 // config.train.batch_size))


def dataset_factory(root: str, config: RunConfig, position: Callable[[], int]) -> Callable[[], ray.data.Dataset]:
    """Return what Ray Train calls at every (re)start of its workers: the dataset from where the latest checkpoint stands."""
    return lambda: pair_dataset(root, config, start_row=position())
