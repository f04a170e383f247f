"""Where networks compute and in which precision: devices, dtypes, threads.

What a process does with freed memory is `resshift.allocator`, a module of its own: processes that never
import torch, such as the gateway of an endpoint, need it too.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar, cast

import cv2
import torch
from torch import nn

from resshift.models import Dtype

Module = TypeVar("Module", bound=nn.Module)
# Names of `train.precision`.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device that `device` names; "auto" takes CUDA, then MPS, then the CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that `dtype` names for `device`; "auto" is bfloat16 on CUDA cards that have it, else
    float32.

    Raises:
        ValueError: Unknown name.
    """
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if dtype not in named:
        raise ValueError(f"dtype must be auto, {', '.join(named)}, got {dtype!r}")
    return named[dtype]


def on_device(module: Module, device: torch.device, channels_last: bool = True) -> Module:
    """Move a module; channels-last convolutions are twice as fast on CPUs, and what tensor cores want."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return cast(Any, module).to(device=device, memory_format=memory_format)


def num_cores() -> int:
    """Return how many cores this process may use: under taskset, and in containers with a set of CPUs, fewer
    than the machine has.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which networks with float32 weights compute in `dtype`; nothing changes with
    float32.
    """
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def is_emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a CPU has no instructions for arithmetic in `dtype`: float32 is several times faster
    then.
    """
    instructions = {
        torch.bfloat16: ("avx512_bf16", "amx_bf16"),
        torch.float16: ("avx512_fp16", "amx_fp16"),
    }.get(dtype, ())
    if device.type != "cpu" or not instructions:
        return False
    facts = torch.cpu.get_capabilities()
    return facts.get("architecture") == "x86_64" and not any(facts.get(name) for name in instructions)


def use_one_thread() -> None:
    """Keep OpenCV and torch to one thread in this process. For workers of which there is one a core: threads
    of several fight.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
