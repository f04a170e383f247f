"""A compiled network gives what the eager one gives, and steps aside where it cannot be compiled."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from resshift.compiled import Compiled

CPU = torch.device("cpu")


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_result_is_that_of_the_function_and_its_own_memory() -> None:
    call = Compiled(double, "double", CPU, backend="eager")
    first = call(torch.ones(3))
    call(torch.zeros(3))
    assert torch.equal(first, torch.full((3,), 2.0))


def test_a_failing_compiler_is_reported_once_and_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object, **__: object) -> object:
        def run(*_: object) -> Tensor:
            raise RuntimeError("no C++ compiler\nmore")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    call = Compiled(double, "double", CPU)
    with caplog.at_level(logging.WARNING):
        results = [call(torch.ones(2)) for _ in range(2)]
    assert all(torch.equal(result, torch.full((2,), 2.0)) for result in results)
    assert [record.getMessage() for record in caplog.records] == ["double runs uncompiled: RuntimeError: no C++ compiler"]


def test_running_out_of_memory_is_not_the_compilers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def crowded(*_: object, **__: object) -> object:
        def run(*_: object) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    monkeypatch.setattr(torch, "compile", crowded)
    with pytest.raises(torch.OutOfMemoryError):
        Compiled(double, "double", CPU)(torch.ones(2))
