"""Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in PyTorch, many
streams at once, with the numbers of `numpy.random.Philox`.

Torch has signed 64-bit integers that wrap; products of 128 bits are put together from four of 32 x 32 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def random_u16(keys: Tensor, count: int) -> Tensor:
    """Return the first 16-bit numbers of streams, the words of each 64-bit number from the lowest on.

    Args:
        keys: 64-bit words of the keys, (2, N) int64.
        count: Numbers of each stream.

    Returns:
        (N, count) int32 in [0, 65536).
    """
    words = _blocks(keys, -(-count // 16))  # (N, blocks, 4)
    shifts = 16 * torch.arange(4, device=keys.device)
    numbers = (words[..., None] >> shifts) & 0xFFFF
    return numbers.int().flatten(1)[:, :count]


def _blocks(keys: Tensor, count: int) -> Tensor:
    """Return blocks 1 to `count` of each stream, (N, count, 4) int64. NumPy starts at 1, too."""
    multiplier, weyl = _pair(_MULTIPLIERS, keys), _pair(_WEYL, keys)
    key = keys[:, :, None]
    # Words (0, 2) of the counter are multiplied, and words (1, 3) are mixed in.
    counter = torch.arange(1, count + 1, device=keys.device).expand(keys.shape[1], count)
    multiplied = torch.stack((counter, torch.zeros_like(counter)))
    mixed = torch.zeros_like(multiplied)
    for _ in range(_ROUNDS):
        high, low = _product(multiplied, multiplier)
        multiplied, mixed = high.flip(0) ^ mixed ^ key, low.flip(0)
        key = key + weyl
    return torch.stack((multiplied[0], mixed[0], multiplied[1], mixed[1]), dim=-1)


def _pair(values: tuple[int, int], like: Tensor) -> Tensor:
    """Return two unsigned constants as int64, (2, 1, 1), without a copy to the device."""
    signed = [value - (1 << 64 if value >> 63 else 0) for value in values]
    is_second = torch.arange(2, device=like.device) == 1
    first, second = (torch.full((2,), value, dtype=torch.int64, device=like.device) for value in signed)
    return torch.where(is_second, second, first)[:, None, None]


def _upper(x: Tensor) -> Tensor:
    return (x >> 32) & _LOW  # `>>` keeps the sign


def _product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 64 bits of the unsigned products."""
    a_low, a_high, b_low, b_high = a & _LOW, _upper(a), b & _LOW, _upper(b)
    first = a_high * b_low + _upper(a_low * b_low)
    second = a_low * b_high + (first & _LOW)
    return a_high * b_high + _upper(first) + _upper(second), a * b
