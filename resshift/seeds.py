"""Where every random number comes from.

A stream is named by a *sequence* of parts, for example `(run_seed, "degrade", epoch, key)`. The parts are hashed into the 128-bit key of a
counter-based generator (Philox, Salmon et al. 2011), so what a sample is never depends on the batch, the worker, the order of work or a
restart. `seed + epoch` is not used anywhere: with it seed 1, epoch 2 would equal seed 2, epoch 1.

`NoiseField` is the same idea for pictures: standard normal noise as a function of the absolute position in the latent, so a tile sees the
same noise as the whole picture would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

Part = int | str


def derive(*parts: Part) -> int:
    """Hash the parts into a 128-bit integer.

    Args:
        parts: integers (any size, negative too) and strings. `1` and `"1"` differ, and so do `("ab", "c")` and `("a", "bc")`.

    Raises:
        TypeError: a part is neither an int nor a str (a float or None would make streams collide silently).
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
    """A key in the place of a seed. `Philox(key=...)` gives the same stream, but asks the operating system for entropy first."""

    def __init__(self, key: int) -> None:
        self._words = np.frombuffer(key.to_bytes(16, "little"), dtype="<u8").astype(np.uint64)

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint32) -> NDArray[np.uint32 | np.uint64]:
        """Return the two 64-bit words of the key, which is what Philox asks for."""
        if n_words != 2 or np.dtype(dtype) != np.uint64:
            raise ValueError(f"a key has 2 words of 64 bits, not {n_words} of {np.dtype(dtype)}")
        return self._words


def philox(*parts: Part) -> np.random.Generator:
    """Return the NumPy generator of the stream named by `parts`."""
    return np.random.Generator(np.random.Philox(_Key(derive(*parts))))  # pyright: ignore[reportArgumentType]  # missing in NumPy's stubs


def torch_generator(*parts: Part, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the torch generator of the stream named by `parts`, on `device`.

    Generators of the CPU and of CUDA give different numbers for one seed: draw on the CPU what must not depend on the device.
    """
    return torch.Generator(device=device).manual_seed(derive(*parts) % 2**63)


class NoiseField:
    """Standard normal noise over an unbounded latent plane, drawn block by block.

    The value at (step, channel, y, x) is a pure function of `parts` and of those four numbers; which rectangle is asked for, and in which
    order, changes nothing.

    Args:
        parts: what names the picture, for example `(seed, "picture", key)`.
        channels: latent channels Z.
        block_px: side of a block in latent pixels. Part of the definition: another side gives other noise.
    """

    def __init__(self, *parts: Part, channels: int, block_px: int = 64) -> None:
        self.parts = parts
        self.channels = channels
        self.block_px = block_px

    def _block(self, step: int, i_row: int, i_column: int) -> np.ndarray:
        rng = philox(*self.parts, "noise", step, i_row, i_column)
        return rng.standard_normal((self.channels, self.block_px, self.block_px), dtype=np.float32)

    def window(self, step: int, top: int, left: int, height: int, width: int) -> Tensor:
        """Return the noise of a rectangle, (Z, height, width) float32 on the CPU."""
        out = np.empty((self.channels, height, width), dtype=np.float32)
        side = self.block_px
        for i_row in range(top // side, -(-(top + height) // side)):
            for i_column in range(left // side, -(-(left + width) // side)):
                y0, x0 = max(top, i_row * side), max(left, i_column * side)
                y1, x1 = min(top + height, (i_row + 1) * side), min(left + width, (i_column + 1) * side)
                block = self._block(step, i_row, i_column)
                out[:, y0 - top : y1 - top, x0 - left : x1 - left] = block[
                    :, y0 - i_row * side : y1 - i_row * side, x0 - i_column * side : x1 - i_column * side
                ]
        return torch.from_numpy(out)

    def for_latent(self, height: int, width: int, device: torch.device | str = "cpu") -> Callable[[int], Tensor]:
        """Return `noise(step) -> (1, Z, height, width)` for `resshift.sampler.sample`."""
        return lambda step: self.window(step, 0, 0, height, width)[None].to(device)
