"""Slots of a global batch: which samples of a step belong to which worker.

Slot i of step s holds row s B + i of the stream of training pairs, B the global batch size
(`pipelines.pairs.order`); t and the noise of a sample are functions of (seed, step, slot)
(`resshift.training.step`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Slots:
    """Places [start, stop) in a global batch of `batch_size` samples that belong to one of `num_ranks`
    workers.
    """

    start: int
    stop: int
    batch_size: int
    num_ranks: int

    @classmethod
    def of_rank(cls, batch_size: int, rank: int = 0, num_ranks: int = 1) -> Slots:
        """Return the slots of a worker. Every slot belongs to exactly one worker, and their numbers of slots
        differ by at most one.
        """
        return cls(
            rank * batch_size // num_ranks, (rank + 1) * batch_size // num_ranks, batch_size, num_ranks
        )

    def micro_batches(self, limit: int) -> list[slice]:
        """Divide this worker's samples, counted from 0, into slices of about equal size, at most `limit`."""
        rows = self.stop - self.start
        count = -(-rows // limit)
        edges = [round(i * rows / count) for i in range(count + 1)]
        return [slice(start, end) for start, end in pairwise(edges)]
