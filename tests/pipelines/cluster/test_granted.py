"""The device of a worker process is the one that Ray granted, or the process ends with one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import torch

from pipelines.cluster import granted
from pipelines.cluster.granted import DeviceError, device_of, driver_and_wheel


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("ids", "visible", "expected"),
    [
        ([], None, "cpu"),  # nothing was reserved: GPU 0 is somebody else's
        ([], "0,1", "cpu"),
        (["3"], "3", "cuda:0"),  # an actor of its own: Ray hides the others
        (["5"], "4,5", "cuda:1"),  # Ray Train shows the GPUs of all workers of the node
        (["1"], None, "cuda:1"),  # RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES
        (["GPU-b"], "GPU-a,GPU-b", "cuda:1"),
    ],
)
def test_the_device_is_the_one_that_was_granted(ids: list[str], visible: str | None, expected: str) -> None:
    assert device_of(ids, visible) == torch.device(expected)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_visible_is_an_error() -> None:
    with pytest.raises(
        DeviceError, match=r"granted GPU 2 of .*torch finds 2 and CUDA_VISIBLE_DEVICES is '0,1'"
    ):
        device_of(["2"], "0,1")


def test_a_granted_gpu_without_cuda_names_driver_and_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.256.02  Thu May  2 2024\nGCC 9\n")
    monkeypatch.setattr(granted, "_DRIVER", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    with pytest.raises(DeviceError) as caught:
        device_of(["0"], "0")
    message = str(caught.value)
    assert "\n" not in message
    assert "NVIDIA driver 470.256.02" in message
    assert f"torch {torch.__version__} built for CUDA 13.2" in message


def test_open_drivers_missing_drivers_and_wheels_without_cuda_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = tmp_path / "version"
    monkeypatch.setattr(granted, "_DRIVER", version)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert driver_and_wheel() == f"no NVIDIA driver, torch {torch.__version__} built without CUDA"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build\n")
    assert driver_and_wheel().startswith("NVIDIA driver 560.35.03, ")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "two_gpus")
def test_an_actor_without_a_gpu_computes_on_the_cpu() -> None:
    @ray.remote(num_cpus=0)
    class Actor:
        def device(self) -> str:
            import torch

            from pipelines.cluster.granted import granted_device

            torch.cuda.is_available = lambda: True
            return str(granted_device())

    assert ray.get(Actor.remote().device.remote()) == "cpu"  # type: ignore[attr-defined]
    assert granted.granted_device().type == "cuda"  # a driver is nobody's actor
