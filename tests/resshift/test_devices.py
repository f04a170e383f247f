"""Devices and precisions."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

from resshift.devices import PRECISIONS, autocast, is_emulated, num_cores, resolve_dtype


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_autocast_chooses_the_arithmetic_and_leaves_float32_alone(precision: str) -> None:
    layer = nn.Linear(4, 4)
    with autocast(torch.device("cpu"), PRECISIONS[precision]):
        assert layer(torch.zeros(1, 4)).dtype == PRECISIONS[precision]


def test_an_unknown_dtype_is_named() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    with pytest.raises(ValueError, match="dtype must be auto, float32, bfloat16, float16, got 'int8'"):
        resolve_dtype("int8", torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "precision", "emulated"),
    [
        ({"architecture": "x86_64", "avx2": True}, "bf16", True),
        ({"architecture": "x86_64", "avx2": True}, "fp32", False),
        ({"architecture": "x86_64", "avx512_bf16": True}, "bf16", False),
        ({"architecture": "x86_64", "avx512_bf16": True}, "fp16", True),
        ({"architecture": "x86_64", "amx_bf16": True}, "bf16", False),
        ({"architecture": "aarch64"}, "bf16", False),  # not known there
        ({}, "bf16", False),
    ],
)
def test_precision_that_a_cpu_emulates_is_known(
    facts: dict[str, Any], precision: str, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: facts)
    assert is_emulated(torch.device("cpu"), PRECISIONS[precision]) is emulated
    assert not is_emulated(torch.device("cuda"), PRECISIONS[precision])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux to bind a process to cores")
def test_cores_are_those_that_the_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert num_cores() == len(before)
