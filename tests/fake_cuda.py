"""Tensors that say they are on a CUDA device and have no values: what a test can show of GPU code on a
machine without one.

PyTorch's FakeTensorMode runs every operation on shapes, dtypes and devices alone, and raises where tensors of
two devices meet or a value is asked for. `no_host_traffic` adds what a device would wait for: copies between
host and device. The autograd engine needs a real device, so a backward pass here fills gradients and computes
nothing (`backward_filled`); tests run real ones on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.cuda.amp import common
from torch.utils._python_dispatch import TorchDispatchMode

from resshift import diffusion, seeds
from resshift.networks import swin
from resshift.training import autoencoder, losses

Module = TypeVar("Module", bound=nn.Module)
CUDA = torch.device("cuda", 0)


class HostTraffic(RuntimeError):
    """A copy between host and device, for which one of them waits."""


class _Copies(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device.type != result.device.type:
                raise HostTraffic(
                    f"{tuple(source.shape)} copied from {source.device.type} to {result.device.type}"
                )
        return result


@contextmanager
def no_host_traffic() -> Generator[None]:
    """Raise `HostTraffic` for every copy between devices. Reading a value raises in any case."""
    with _Copies():
        yield


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Make the tensors of a block fake, on a machine that seems to have CUDA: autocast would be off without.

    A generator of a device that is not there cannot be made, and without values there is nothing to draw. A
    copy of a network stays in the mode of the block, and its tensors are moved one by one.
    """
    original, deepcopy, mode = seeds.torch_generator, copy.deepcopy, FakeTensorMode()

    def generator(*parts: seeds.Part, device: torch.device | str = "cpu") -> torch.Generator | None:
        return original(*parts) if torch.device(device).type == "cpu" else None

    with monkeypatch.context() as patch:
        patch.setattr(seeds, "torch_generator", generator)
        patch.setattr(copy, "deepcopy", lambda module: deepcopy(module, {id(mode): mode}))
        patch.setattr(autoencoder, "on_device", lambda module, *_: on_fake_cuda(module))
        patch.setattr(common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch, "manual_seed", lambda seed: torch.default_generator.manual_seed(seed))
        forget_tables()
        try:
            with mode:
                yield
        finally:
            forget_tables()


def forget_tables() -> None:
    """Drop tensors that are kept for a device: fake ones must not meet real ones."""
    diffusion._table.cache_clear()  # pyright: ignore[reportPrivateUsage]
    losses.step_weights_on.cache_clear()
    swin.shifted_window_mask.cache_clear()


@contextmanager
def no_values(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Build and run networks on the meta device, which has no autocast; the one initialisation that looks at
    its values does nothing.
    """

    def unchanged(tensor: Tensor, *_: float, **__: float) -> Tensor:
        return tensor

    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(nn.init, "trunc_normal_", unchanged)
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        yield


def on_fake_cuda(module: Module) -> Module:
    """Replace the tensors of a module from the meta device by fake ones on CUDA, as `devices.on_device` lays
    them out. Tensors that are neither parameters nor buffers stay where they are, as they do on a GPU.
    """

    def fake(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA, memory_format=layout)

    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(fake(parameter), parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, fake(buffer))
    return module


@contextmanager
def backward_filled(networks: Sequence[nn.Module], monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Let backward passes give every parameter of the networks a gradient, without computing it."""

    def backward(loss: Tensor | Sequence[Tensor], gradient: object = None) -> None:
        del gradient
        assert {one.device for one in ([loss] if isinstance(loss, Tensor) else loss)} == {CUDA}
        for network in networks:
            for parameter in network.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)

    def grad(_: Tensor, inputs: Tensor, **__: bool) -> tuple[Tensor]:
        return (torch.empty_like(inputs),)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "backward", backward)
        patch.setattr(torch.autograd, "backward", backward)
        patch.setattr(torch.autograd, "grad", grad)
        yield
