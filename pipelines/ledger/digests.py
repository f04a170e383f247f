"""Sets of millions of strings in a few bytes each.

A key becomes the first bytes of its BLAKE2b digest, and digests lie in sorted NumPy arrays that are merged as
they grow (the logarithmic method: every array is at least twice as long as the next). A look-up is one
vectorised binary search an array. Python's own set of strings takes about 150 bytes a key; these take 16 and
12. `Repeats` holds nothing of a key that occurs once.

Chance of one wrong answer among ten million keys: 3e-25 for `DigestSet` (128 bits), 3e-6 for `OwnerMap` (64
bits), where it would refuse one picture with a row that says so, and for `Repeats` (64 bits), where the
report would miss one row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]


def digests(parts: Sequence[str | tuple[str, ...]]) -> Keys:
    """Return (n, 2) uint64: 128 bits of each string, or of each tuple of strings.

    Strings may hold surrogate escapes (names that are not UTF-8).
    """
    joined = b"".join(
        hashlib.blake2b(
            "\0".join(part if isinstance(part, tuple) else (part,)).encode("utf-8", "surrogateescape"),
            digest_size=16,
        ).digest()
        for part in parts
    )
    return np.frombuffer(joined, dtype=">u8").astype(np.uint64).reshape(-1, 2)


class DigestSet:
    """A set of 128-bit digests, 16 bytes each."""

    def __init__(self, members: Keys | None = None) -> None:
        self._levels: list[Keys] = []
        if members is not None:
            self.add(members)

    def __len__(self) -> int:
        return sum(len(level) for level in self._levels)

    @property
    def num_bytes(self) -> int:
        return sum(level.nbytes for level in self._levels)

    def add(self, members: Keys) -> None:
        """Add (n, 2) digests; those that are there already should not be added again."""
        if not len(members):
            return
        merged = members
        while self._levels and len(self._levels[-1]) < 2 * len(merged):
            merged = np.concatenate([self._levels.pop(), merged])
        self._levels.append(merged[np.argsort(merged[:, 0], kind="stable")])

    def contains(self, wanted: Keys) -> NDArray[np.bool_]:
        """Return (n,) whether each of the (n, 2) digests is a member."""
        found = np.zeros(len(wanted), dtype=bool)
        for level in self._levels:
            place = np.minimum(np.searchsorted(level[:, 0], wanted[:, 0]), len(level) - 1)
            found |= (level[place] == wanted).all(axis=1)
        return found


_NOBODY = np.uint32(0)  # owner of a name that was given back


class OwnerMap:
    """Which key owns an output name, 12 bytes a name: 64 bits of the name, 32 of the key."""

    def __init__(self) -> None:
        self._levels: list[tuple[NDArray[np.uint64], NDArray[np.uint32]]] = []

    def __len__(self) -> int:
        return sum(len(names) for names, _ in self._levels)

    @property
    def num_bytes(self) -> int:
        return sum(names.nbytes + keys.nbytes for names, keys in self._levels)

    def claim(self, outputs: Keys, keys: Keys) -> NDArray[np.bool_]:
        """Give each output name to its key unless another key has it.

        Args:
            outputs: Digests of the names, (n, 2).
            keys: Digests of the keys that want them, (n, 2); earlier rows come first.

        Returns:
            (n,) whether the key has the name now.
        """
        names, owners = outputs[:, 0], _owners(keys)
        granted = np.ones(len(names), dtype=bool)
        is_new = np.ones(len(names), dtype=bool)
        for level_names, level_owners in self._levels:
            place = np.minimum(np.searchsorted(level_names, names), len(level_names) - 1)
            known = level_names[place] == names
            is_new &= ~known
            for i in np.flatnonzero(known & (level_owners[place] == _NOBODY)):
                if level_owners[place[i]] == _NOBODY:  # the first of the batch takes what was given back
                    level_owners[place[i]] = owners[i]
            granted &= ~known | (level_owners[place] == owners)
        # Within the batch the first one wins.
        unique, first, inverse = np.unique(names, return_index=True, return_inverse=True)
        granted &= ~is_new | (owners[first[inverse]] == owners)
        fresh = is_new[first]
        if fresh.any():
            self._append(unique[fresh], owners[first[fresh]])
        return granted

    def release(self, output: Keys) -> None:
        """Take a name, the digest of which is (1, 2), from its owner; the next claim gets it."""
        for names, owners in self._levels:
            place = min(int(np.searchsorted(names, output[0, 0])), len(names) - 1)
            if names[place] == output[0, 0]:
                owners[place] = _NOBODY

    def _append(self, names: NDArray[np.uint64], owners: NDArray[np.uint32]) -> None:
        while self._levels and len(self._levels[-1][0]) < 2 * len(names):
            more_names, more_owners = self._levels.pop()
            names, owners = np.concatenate([more_names, names]), np.concatenate([more_owners, owners])
        order = np.argsort(names, kind="stable")
        self._levels.append((names[order], owners[order]))


def _owners(keys: Keys) -> NDArray[np.uint32]:
    """Return 32 bits of each digest, none of which is `_NOBODY`."""
    return np.maximum(keys[:, 0].astype(np.uint32), np.uint32(1))


@dataclass(frozen=True, slots=True)
class Repeats:
    """Where the keys of a long sequence occur last, without a state for every key.

    A bit array (a Bloom filter with one hash) tells in one pass which keys may have occurred before. Only
    these are kept, at 16 bytes an occurrence: all repeats, and of the other keys a share of about
    keys / (2 bits).

    Fields:
        digests: 64 bits of each key that was kept, (n,), ascending.
        last: Position in the sequence at which each of them occurs last, (n,).
    """

    digests: NDArray[np.uint64]
    last: NDArray[np.int64]

    @classmethod
    def among(cls, batches: Iterable[NDArray[np.uint64]], log2_bits: int) -> Repeats:
        """Go through a sequence once.

        Args:
            batches: 64 bits of each key, in order.
            log2_bits: Size of the bit array, at least 3 and at most 63.
        """
        seen = np.zeros(1 << (log2_bits - 3), dtype=np.uint8)
        kept = [np.zeros(0, dtype=np.uint64)]
        positions = [np.zeros(0, dtype=np.int64)]
        start = 0
        for keys in batches:
            slots = keys >> np.uint64(64 - log2_bits)
            places, bits = slots >> np.uint64(3), np.uint8(1) << (slots & np.uint64(7)).astype(np.uint8)
            is_again = np.ones(len(keys), dtype=bool)
            is_again[np.unique(slots, return_index=True)[1]] = False  # within the batch
            is_again |= (seen[places] & bits) != 0
            np.bitwise_or.at(seen, places, bits)
            kept.append(keys[is_again])
            positions.append(start + np.flatnonzero(is_again))
            start += len(keys)
        del seen
        digests, last = np.concatenate(kept), np.concatenate(positions)
        order = np.argsort(digests, kind="stable")  # positions of one key stay ascending
        digests, last = digests[order], last[order]
        is_end = np.append(digests[1:] != digests[:-1], np.ones(min(1, len(digests)), dtype=bool))
        return cls(digests[is_end], last[is_end])

    def is_last(self, keys: NDArray[np.uint64], start: int) -> NDArray[np.bool_]:
        """Return (n,) whether each key occurs there for the last time.

        Args:
            keys: A batch of the sequence, (n,).
            start: Position of its first key in the sequence.
        """
        if not len(self.digests):
            return np.ones(len(keys), dtype=bool)
        place = np.minimum(np.searchsorted(self.digests, keys), len(self.digests) - 1)
        return (self.digests[place] != keys) | (self.last[place] == start + np.arange(len(keys)))
