"""Streams of random numbers.

A stream is named by a *sequence* of parts, for example `(run_seed, "degrade", epoch, key)`. The parts are
hashed to the 128-bit key of a counter-based generator (Philox, Salmon et al. 2011), so a sample never depends
on the batch, the worker, the order of work or a restart. `seed + epoch` is not used anywhere: seed 1, epoch 2
would equal seed 2, epoch 1.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    import torch

Part = int | str


def derive(*parts: Part) -> int:
    """Hash the parts into a 128-bit integer.

    Args:
        parts: Integers of any size and sign, and strings. `1` and `"1"` differ, and so do `("ab", "c")` and
            `("a", "bc")`.

    Raises:
        TypeError: A part is neither an int nor a str.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a part of a seed must be an int or a str, got {part!r}")
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return int.from_bytes(digest.digest(), "little")


class _Key(np.random.bit_generator.ISeedSequence):
    """A key instead of a seed. `Philox(key=...)` gives the same stream, but reads entropy from the operating
    system first.
    """

    def __init__(self, key: int) -> None:
        self._words = np.frombuffer(key.to_bytes(16, "little"), dtype="<u8").astype(np.uint64)

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint32) -> NDArray[np.uint32 | np.uint64]:
        """Return the two 64-bit words of the key, which are all that Philox asks for."""
        if n_words != 2 or np.dtype(dtype) != np.uint64:
            raise ValueError(f"a key has 2 words of 64 bits, not {n_words} of {np.dtype(dtype)}")
        return self._words


def philox(*parts: Part) -> np.random.Generator:
    """Return the NumPy generator of the stream named by `parts`."""
    return np.random.Generator(np.random.Philox(_Key(derive(*parts))))  # pyright: ignore[reportArgumentType]  # missing in NumPy's stubs


def torch_generator(*parts: Part, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the torch generator of the stream named by `parts`, on `device`.

    Generators of the CPU and of CUDA give different numbers for one seed: numbers that must not depend on the
    device have to be drawn on the CPU.
    """
    # Imported here: most processes need only names and NumPy streams, and torch takes half a gigabyte.
    import torch

    return torch.Generator(device=device).manual_seed(derive(*parts) % 2**63)
