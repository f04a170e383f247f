"""A compiled network gives what the eager one gives, and steps aside where it cannot be compiled."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from resshift.networks.config import FirstStageConfig, VQConfig
from resshift.presets import preset
from resshift.tiles.compiled import Compiled
from resshift.training.step import build_network
from resshift.upscaler import Upscaler

CPU = torch.device("cpu")


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_result_is_that_of_the_function_and_its_own_memory() -> None:
    call = Compiled(double, "double", CPU, backend="eager")
    first = call(torch.ones(3))
    call(torch.zeros(3))
    assert torch.equal(first, torch.full((3,), 2.0))


def test_a_failing_compiler_is_reported_once_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> object:
        def run(*_: object) -> Tensor:
            raise RuntimeError("no C++ compiler\nmore")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    call = Compiled(double, "double", CPU)
    with caplog.at_level(logging.WARNING):
        results = [call(torch.ones(2)) for _ in range(2)]
    assert all(torch.equal(result, torch.full((2,), 2.0)) for result in results)
    assert [record.getMessage() for record in caplog.records] == [
        "double runs uncompiled: RuntimeError: no C++ compiler"
    ]


def test_running_out_of_memory_is_not_the_compilers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def crowded(*_: object, **__: object) -> object:
        def run(*_: object) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    monkeypatch.setattr(torch, "compile", crowded)
    with pytest.raises(torch.OutOfMemoryError):
        Compiled(double, "double", CPU)(torch.ones(2))


@pytest.mark.parametrize("first_stage", ["pixel_unshuffle", "vq"])
def test_upscaler_calls_compiled_networks_for_every_stage(
    first_stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []

    def remember(function: object, **_: object) -> object:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", remember)
    config = preset("test-x4")
    model, network = config.model, build_network(config)
    if first_stage == "vq":
        unet, stage = (
            replace(model.unet, in_channels=3, out_channels=3, pixel_head_channels=0),
            FirstStageConfig(vq=VQConfig(ch=32, num_res_blocks=1, n_embed=64)),
        )
        model = replace(model, unet=unet, first_stage=stage)
        network = build_network(replace(config, model=model))
    eager = Upscaler(model, network, device="cpu")
    up = Upscaler(model, network, eager.first_stage, device="cpu", compile=True)
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    assert np.array_equal(up(image), eager(image))
    assert len(compiled) == (1 if first_stage == "pixel_unshuffle" else 3)
