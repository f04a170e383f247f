"""FSDP2 and HSDP for the networks of a run, and conversion between shards and whole tensors.

Weights, averages and moments are distributed over the workers; `resshift.training.parts` writes and reads
them. `whole` is a collective operation: every worker must call it, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from resshift.config import ConfigError


def shard(
    network: nn.Module,
    device: torch.device,
    way: Literal["fsdp", "hsdp"] = "fsdp",
    gradient_dtype: Literal["fp32", "bf16"] = "fp32",
) -> nn.Module:
    """Shard the parameters of a network in place, in one group for each member of its module lists, and
    return the network.

    Args:
        network: Network with the same weights on every worker.
        device: Device of the network.
        way: "fsdp" shards over all workers; "hsdp" over those of a node, and averages over the nodes.
        gradient_dtype: Arithmetic in which gradients are averaged.

    Raises:
        ConfigError: The nodes have different numbers of workers, and "hsdp" was asked for.
    """
    shape = mesh_shape(way, ranks_of_nodes(way))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    # FSDP2 (torch 2.15) refuses weights in another memory layout, such as channels-last.
    cast(Any, network).to(memory_format=torch.contiguous_format)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if gradient_dtype == "bf16" else None)
    for child in network.children():
        for stage in child if isinstance(child, nn.ModuleList) else ():
            fully_shard(stage, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)
    return network


def ranks_of_nodes(way: str) -> list[int]:
    """Return for each worker how many workers its node has; with "fsdp" nodes do not count."""
    num_ranks = dist.get_world_size()
    if way == "fsdp":
        return [num_ranks] * num_ranks
    counts: list[Any] = [None] * num_ranks
    dist.all_gather_object(counts, int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)))
    return counts


def mesh_shape(way: str, ranks_of_nodes: list[int]) -> tuple[int, ...]:
    """Return the shape of the mesh: (workers,), or (nodes, workers of a node), which replicates over the
    first axis and shards over the second.
    """
    num_ranks, of_a_node = len(ranks_of_nodes), ranks_of_nodes[0]
    if len(set(ranks_of_nodes)) > 1:
        raise ConfigError(
            f"train.parallel={way} needs equally many workers on every node, got "
            f"{sorted(set(ranks_of_nodes))}: use fsdp or ddp"
        )
    return (num_ranks,) if of_a_node == num_ranks else (num_ranks // of_a_node, of_a_node)


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
    """Return a whole tensor sharded as `like`, or as it is if `like` is no shard or it is one itself. Every
    worker has the whole tensor, so nothing is sent.
    """
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the result of `optimizer.state_dict()` with moments whole or sharded, whether the parameters are
    sharded now or not.
    """
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
