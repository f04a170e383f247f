"""Repeated keys of a sequence, against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.ledger.digests import Repeats, digests


@pytest.mark.parametrize("log2_bits", [3, 8, 16])  # full at once, crowded, roomy
@pytest.mark.parametrize("num_keys", [1, 40, 100_000])
def test_a_key_is_last_where_no_later_one_is_the_same(log2_bits: int, num_keys: int) -> None:
    which = np.random.default_rng(num_keys).integers(0, num_keys, 1000)
    keys = digests([f"photos/{i}.jpg" for i in which.tolist()])[:, 0]
    starts = [0, 1, 2, 90, 500, 500, 1000]
    batches = [keys[start:end] for start, end in zip(starts, [*starts[1:], len(keys)], strict=True)]
    repeats = Repeats.among(batches, log2_bits)
    is_last = [repeats.is_last(keys, start) for keys, start in zip(batches, starts, strict=True)]
    position = {key: i for i, key in enumerate(keys.tolist())}
    assert np.concatenate(is_last).tolist() == [position[key] == i for i, key in enumerate(keys.tolist())]


def test_keys_that_occur_once_are_not_kept() -> None:
    keys = digests([f"photos/{i}.jpg" for i in range(20_000)])[:, 0]
    repeats = Repeats.among([keys, keys[:10]], 20)
    assert 10 <= len(repeats.digests) < 400  # 20 000 / 2 / 2 ** 20 is a share of 1 %
