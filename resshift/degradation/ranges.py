"""Ranges and probabilities of recipes, and draws from them.

`Draws` takes uniform numbers from the generator in blocks: one call of NumPy takes as long as sixty numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Range = tuple[float, float]
IntRange = tuple[int, int]

_BLOCK = 64


def check_prob(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value}: must be a probability in [0, 1]")


def check_probs(name: str, values: tuple[float, ...]) -> None:
    """Raise ValueError unless no value is negative and the sum is 1."""
    if min(values) < 0 or abs(sum(values) - 1) > 1e-6:
        raise ValueError(f"{name} = {values}: must be probabilities that sum to 1")


def check_range(name: str, value: tuple[float, float], low: float, high: float = math.inf) -> None:
    """Raise ValueError unless `value` is an ordered pair within [low, high]."""
    if not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{name} = {value}: must be (low, high) with {low} <= low <= high <= {high}")


def check_sizes(name: str, value: IntRange) -> None:
    """Raise ValueError unless `value` is an ordered pair of odd kernel sizes."""
    check_range(name, value, 1)
    if value[0] % 2 == 0 or value[1] % 2 == 0:
        raise ValueError(f"{name} = {value}: both kernel sizes must be odd")


class Draws:
    """The random choices of one sample, in the order of the calls.

    Args:
        rng: Generator of the sample. Numbers are taken in blocks, so afterwards it has given more numbers
            than were used.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._block: list[float] = []

    def unit(self) -> float:
        """Draw a number from [0, 1), with 53 bits."""
        if not self._block:
            self._block = self._rng.random(_BLOCK).tolist()[::-1]
        return self._block.pop()

    def chance(self, probability: float) -> bool:
        """Draw True with the given probability."""
        return self.unit() < probability

    def uniform(self, interval: Range) -> float:
        """Draw a number from [low, high)."""
        return interval[0] + (interval[1] - interval[0]) * self.unit()

    def integer(self, interval: IntRange, step: int = 1) -> int:
        """Draw one of low, low + step, ..., up to and including high."""
        return interval[0] + step * int(self.unit() * ((interval[1] - interval[0]) // step + 1))

    def index(self, probabilities: Sequence[float]) -> int:
        """Draw an index by its probability; an index of probability 0 is never drawn."""
        rest = self.unit() * math.fsum(probabilities)
        chosen = 0
        for i, probability in enumerate(probabilities):
            if probability > 0:
                chosen = i
                if rest < probability:
                    break
                rest -= probability
        return chosen

    def around_one(self, interval: Range) -> float:
        """Draw from [low, 1) or from [1, high), with equal probabilities. A uniform draw from (0.5, 4) would
        rarely be below 1.
        """
        return self.uniform((interval[0], 1.0) if self.chance(0.5) else (1.0, interval[1]))
