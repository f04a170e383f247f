"""What a recipe is made of, ranges and probabilities, and how a value is drawn from them.

`Draws` takes its uniform numbers from the generator in bulk: one call of NumPy costs as much as sixty of its
numbers.
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
    """The random choices of one sample, in the order in which they are asked for.

    Args:
        rng: generator of the sample. Numbers are taken in blocks: it is further along afterwards than the
            choices made.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._block: list[float] = []

    def unit(self) -> float:
        """Draw from [0, 1), with 53 bits."""
        if not self._block:
            self._block = self._rng.random(_BLOCK).tolist()[::-1]
        return self._block.pop()

    def chance(self, probability: float) -> bool:
        """Draw True with a probability."""
        return self.unit() < probability

    def uniform(self, interval: Range) -> float:
        """Draw from [low, high)."""
        return interval[0] + (interval[1] - interval[0]) * self.unit()

    def integer(self, interval: IntRange, step: int = 1) -> int:
        """Draw low, low + step, ... up to high, which is included."""
        return interval[0] + step * int(self.unit() * ((interval[1] - interval[0]) // step + 1))

    def index(self, probabilities: Sequence[float]) -> int:
        """Draw an index; one whose probability is 0 never comes."""
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
        """Draw from [low, 1) or from [1, high), evenly: a plain draw from (0.5, 4) would hardly ever be below
        1.
        """
        return self.uniform((interval[0], 1.0) if self.chance(0.5) else (1.0, interval[1]))
