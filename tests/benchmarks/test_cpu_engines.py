"""Which engine gives other bytes, and why, is told apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.scripts import load_script

engines = load_script("benchmarks/cpu_engines.py")


def depends_on(what: str) -> dict[str, bool]:
    """Return what `same_bytes` says of an engine that depends on one thing."""
    calls = 0

    def session(threads: int) -> object:
        def call(inputs: dict[str, Tensor]) -> Tensor:
            nonlocal calls
            calls += 1
            extra = {"repeated": calls, "threads": threads, "batch": len(inputs["x"]), "nothing": 0}[what]
            return inputs["x"] + extra

        return call

    engine = engines.Engine("stand-in", {1: session(1), 2: session(2)})
    batch = {"x": torch.arange(6.0).reshape(3, 2)}
    return engines.same_bytes(engine, batch, {"x": torch.zeros(1, 5)})


@pytest.mark.parametrize("what", ["threads", "batch"])
def test_a_dependence_is_found(what: str) -> None:
    assert [name for name, same in depends_on(what).items() if not same] == [f"same_{what}"]


def test_what_depends_on_nothing_is_the_same_everywhere() -> None:
    assert all(depends_on("nothing").values())


def test_calls_that_differ_are_the_same_nowhere() -> None:
    assert not any(depends_on("repeated").values())
