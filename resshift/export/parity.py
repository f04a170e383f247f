"""The check of an export: the largest difference between what was written and the model that it is made from.

Sizes are other than the traced one; the unit is a whole window of every level (`Graph.window`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from resshift.export.graphs import Graph

Run = Callable[[Mapping[str, Tensor]], Tensor]

# (batch, rows, columns) in windows.
TRACED = (2, 2, 3)
CHECKED = ((1, 2, 2), (1, 3, 2), (2, 2, 2))
# Runtimes add up in other orders; 1e-6 of the largest value was measured for the models that ship.
TOLERANCE = 1e-4


class ParityError(RuntimeError):
    """An export does not compute what its model computes."""


@dataclass(frozen=True, slots=True)
class Parity:
    """A comparison: the largest difference for one input, and the largest value."""

    graph: str
    shape: tuple[int, ...]
    difference: float
    largest: float

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.graph} {size}: largest difference {self.difference:.2g} of {self.largest:.2g}"


def check(graph: Graph, run: Run, sizes: tuple[tuple[int, int, int], ...] = CHECKED) -> Iterator[Parity]:
    """Compare an exported graph with its module at several sizes.

    Args:
        graph: What was exported.
        run: The export, read back.
        sizes: (batch, rows, columns) in windows.

    Raises:
        ParityError: A difference exceeds `TOLERANCE` of the largest value.
    """
    for batch, rows, columns in sizes:
        inputs = graph.examples(batch, rows * graph.window, columns * graph.window)
        with torch.inference_mode():
            expected = graph.module(**inputs)
        difference, largest = (
            float(values.abs().max()) for values in (run(inputs).float() - expected, expected)
        )
        found = Parity(graph.name, tuple(next(iter(inputs.values())).shape), difference, largest)
        if not difference <= TOLERANCE * largest:
            raise ParityError(f"{found}, more than {TOLERANCE:g} of it")
        yield found
