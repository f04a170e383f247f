"""The device that Ray granted to a worker process.

Ray 2.60 leaves CUDA_VISIBLE_DEVICES as it is for a process that reserves no GPU, so torch's own choice there
is GPU 0, which another process has reserved. And where torch cannot use CUDA, its own choice is the CPU,
while Ray counts the GPU as used. So the device follows from the grant, and a grant that cannot be used is an
error.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import ray
import torch

from resshift.devices import resolve_device

_DRIVER = Path("/proc/driver/nvidia/version")


class DeviceError(RuntimeError):
    """Ray granted a GPU that torch cannot use; the message is one line for the user."""


def granted_device() -> torch.device:
    """Return the device to compute on: the first GPU that Ray granted to this actor, else the CPU (on a Mac
    its GPU, which Ray does not manage). Outside of an actor it is torch's own choice.

    Raises:
        DeviceError: A GPU was granted and torch finds no CUDA, or not this GPU.
    """
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return resolve_device("auto")
    granted = sorted(map(str, ray.get_gpu_ids()))
    return device_of(granted, os.environ.get("CUDA_VISIBLE_DEVICES"))


def device_of(granted: list[str], visible: str | None) -> torch.device:
    """Return the device of a process.

    Args:
        granted: Identifiers of the GPUs that Ray granted to it.
        visible: Its CUDA_VISIBLE_DEVICES, None if it is not set. Ray Train shows to each worker the GPUs of
            all workers of its node.

    Raises:
        DeviceError: As `granted_device`.
    """
    if not granted:
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    where = f"Ray granted GPU {', '.join(granted)} of {socket.gethostname()}"
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{where}, but torch finds no CUDA: {driver_and_wheel()}. Install a driver and a wheel that fit "
            "each other, or reserve no GPU (--gpus-per-worker 0, engine.num_gpus=0)"
        )
    names = granted if visible is None else visible.split(",")
    index = int(granted[0]) if visible is None and granted[0].isdecimal() else _position(granted[0], names)
    if index is None or index >= torch.cuda.device_count():
        raise DeviceError(
            f"{where}, but torch finds {torch.cuda.device_count()} and CUDA_VISIBLE_DEVICES is {visible!r}"
        )
    return torch.device("cuda", index)


def _position(name: str, names: list[str]) -> int | None:
    return names.index(name) if name in names else None


def driver_and_wheel() -> str:
    """Return what decides whether torch can use CUDA: the NVIDIA driver of this machine and the build of
    torch.
    """
    told = _DRIVER.read_text() if _DRIVER.exists() else ""
    found = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", told)
    driver = f"NVIDIA driver {found[1]}" if found else "no NVIDIA driver"
    cuda = torch.version.cuda
    wheel = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    return f"{driver}, torch {torch.__version__} {wheel}"
