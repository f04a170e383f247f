"""Pairs of given rows: read, decode, crop, degrade; uint8 columns.

What a pair is depends on (seed, epoch, key) alone; where it stands in the stream on (seed, batch size, row
number) alone (`pipelines.pairs.order`).

Columns of a batch: hq (H, W, 3) and lq (H / scale, W / scale, 3) uint8; mask (H, W) uint8, 255 in a hole,
with inpainting only; key; epoch; row, its number in the stream; substituted, 1 when the picture could not be
decoded any more. It is replaced by the next decodable picture of its row group, with the crop and degradation
of the broken one: no other pair moves, and the replacement does not depend on the reader.

With `data.degrade_on=device` the degradation is drawn here and applied by the worker that trains: plan
(PLAN_BYTES,) uint8 (`resshift.degradation.on_device.plan`) takes the place of lq.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.pairs.order import Piece, Rows, Span
from pipelines.pairs.parcels import Batch, Turns, to_block
from pipelines.pairs.photos import groups_ahead
from pipelines.shards.pictures import Photo
from resshift import degradation
from resshift.config import DataConfig
from resshift.degradation.on_device.plan import PLAN_BYTES, encode
from resshift.images import ImageError
from resshift.pairs.training_pair import TrainingPair, draw_pair, make_pair, stored_pair

Pictures = dict[str, NDArray[np.uint8]]


def pair_of(
    photo: Photo, key: str, epoch: int, seed: int, crop: DataConfig, recipe: degradation.DegradationRecipe
) -> TrainingPair:
    """Return the pair of a row of shards: made of a photo, or as it was stored. Arguments and errors are
    those of `make_pair`.
    """
    if photo.pair is None:
        return make_pair(photo.data, key, epoch, seed, crop, recipe)
    return stored_pair(photo.pair, key, epoch, seed, crop, recipe.scale)


class _Made(NamedTuple):
    """A pair in its place; `substituted` tells whether another picture stands in."""

    row: int
    epoch: int
    key: str
    pictures: Pictures
    substituted: bool


@dataclass(frozen=True, slots=True)
class PairMaker:
    """Everything that a task needs besides the rows: where the shards are, and what a pair is."""

    root: str
    seed: int
    crop: DataConfig
    recipe: degradation.DegradationRecipe

    def blocks(self, spans: Sequence[Span], turns: Turns) -> Iterator[pa.Table]:
        """Make the rows of consecutive spans and yield them as parcels.

        Raises:
            ImageError: Not one picture of a whole row group can be decoded any more.
            StorageError: A shard cannot be read.
        """
        pieces = [span.piece(self.seed, turns.batch_size) for span in spans]
        parcels = turns.parcels(np.concatenate([piece.rows for piece in pieces]))
        for i, batch in enumerate(self.batches(pieces, parcels)):
            yield to_block(batch, i % turns.num_ranks)

    def batches(self, pieces: Sequence[Piece], parts: Sequence[Rows]) -> Iterator[Batch]:
        """Yield the pairs of each part; columns: the module docstring.

        Args:
            pieces: What to make.
            parts: The rows of each batch, as indices among those of all pieces laid end to end.

        Raises:
            ImageError: Not one picture of a whole row group can be decoded any more.
            StorageError: A shard cannot be read.
        """
        pairs = self._pairs(pieces, np.concatenate(parts))
        for part in parts:
            yield self._batch(itertools.islice(pairs, len(part)), len(part))

    def _pairs(self, pieces: Sequence[Piece], order: Rows) -> Iterator[_Made]:
        """Make the rows of the pieces in an order, and read each row group once for all of them."""
        groups = [group for piece in pieces for group in piece.groups]
        offsets = np.cumsum([0, *(len(piece.groups) for piece in pieces)])
        positions = [piece.positions() for piece in pieces]
        i_group = np.concatenate(
            [first + found for first, (found, _) in zip(offsets[:-1], positions, strict=True)]
        )[order]
        i_row = np.concatenate([found for _, found in positions])[order]
        rows = np.concatenate([piece.rows for piece in pieces])[order]
        epochs = np.repeat([piece.epoch for piece in pieces], [len(piece.rows) for piece in pieces])[order]
        photos = groups_ahead(self.root, groups, i_group)
        for group, i, row, epoch in zip(photos, i_row.tolist(), rows.tolist(), epochs.tolist(), strict=True):
            yield _Made(row, epoch, *self._pair(group, i, epoch))

    def _pair(self, group: Sequence[Photo], i: int, epoch: int) -> tuple[str, Pictures, bool]:
        key = group[i].key
        failure: ImageError | None = None
        for step in range(len(group)):
            photo = group[(i + step) % len(group)]
            try:
                return key, self._pictures(photo, key, epoch), step > 0
            except ImageError as error:
                failure = failure or error
        raise failure or ValueError("an empty row group has no pairs")

    def _pictures(self, photo: Photo, key: str, epoch: int) -> Pictures:
        if self.crop.degrade_on == "device":
            hq_u8, params = draw_pair(photo.data, key, epoch, self.seed, self.crop, self.recipe)
            return {"hq": hq_u8, "plan": encode(params, self.crop.crop_px)}
        pair = pair_of(photo, key, epoch, self.seed, self.crop, self.recipe)
        made = {"hq": pair.hq_u8, "lq": pair.lq_u8}
        return made if pair.mask_u8 is None else made | {"mask": pair.mask_u8}

    def _batch(self, pairs: Iterable[_Made], num_rows: int) -> Batch:
        """Write each pair into its place as it comes: joined at the end, all pairs would be held twice."""
        px = self.crop.crop_px
        small = px // self.recipe.scale
        batch: Batch = {
            "key": np.empty(num_rows, object),
            "epoch": np.empty(num_rows, np.int64),
            "row": np.empty(num_rows, np.int64),
            "substituted": np.zeros(num_rows, np.uint8),
            "hq": np.empty((num_rows, px, px, 3), np.uint8),
        }
        if self.crop.degrade_on == "device":
            batch["plan"] = np.empty((num_rows, PLAN_BYTES), np.uint8)
        else:
            batch["lq"] = np.empty((num_rows, small, small, 3), np.uint8)
        if self.recipe.kind == "inpainting":
            batch["mask"] = np.empty((num_rows, small, small), np.uint8)
        for i, (row, epoch, key, pictures, substituted) in enumerate(pairs):
            batch["row"][i], batch["epoch"][i], batch["key"][i], batch["substituted"][i] = (
                row,
                epoch,
                key,
                substituted,
            )
            for name, picture in pictures.items():
                batch[name][i] = picture
        return batch
