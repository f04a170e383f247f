"""FSDP2 for the networks of a run, and conversion between shards and whole tensors.

Weights, averages and moments are distributed over the workers. Checkpoints hold whole tensors, so a run can
continue with another number of workers, or without sharding. `whole` is a collective operation: every worker
must call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def shard(network: nn.Module, device: torch.device) -> nn.Module:
    """Shard the parameters of a network in place, in one group for each member of its module lists, and
    return the network.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for child in network.children():
        for stage in child if isinstance(child, nn.ModuleList) else ():
            fully_shard(stage, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def synchronise_gradients(network: nn.Module, wanted: bool) -> None:
    """Set whether the next backward pass averages gradients over the workers, as that of the last micro-batch
    of a step does.
    """
    if isinstance(network, DistributedDataParallel):
        network.require_backward_grad_sync = wanted
    elif isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(wanted)


def whole(value: Any, keep: bool = True) -> Any:
    """Copy a state dict to the CPU with all shards gathered. The result shares no memory with the
    original.

    Args:
        value: State dict, or a part of one.
        keep: Whether this worker needs the copy; the others help to gather shards, one tensor at a time, and
            hold nothing: they get None in place of each tensor.
    """
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.detach().to("cpu", copy=True) if keep else None
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True) if keep else None
    if isinstance(value, Mapping):
        return {key: whole(item, keep) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item, keep) for item in cast(list[Any], value))
    return value


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor sharded as `like`, or as it is if `like` is not a shard. Every worker has the
    whole tensor, so nothing is sent.
    """
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the result of `whole(optimizer.state_dict())`, whether the parameters are sharded now or not."""
    parameters: list[Tensor] = [
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ]
    moments = {
        index: {
            name: sharded_like(value, parameters[index])
            if isinstance(value, Tensor) and value.ndim
            else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
