"""Weights, gradients and the optimiser's state cut up among the workers (PyTorch's fully sharded data parallel, its second form).

Accelerate offers it on accelerators only; by PyTorch's own call it is the same on CPUs, where it can be tested. States are saved
whole, so a training may go on with another number of workers, or unsharded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

Model = TypeVar("Model", bound=nn.Module)
Tree = TypeVar("Tree")


def shard(model: nn.Module) -> None:
    """Cut `model` up, in place: a group for each of its blocks, gathered when the block runs, and one for what is left.

    Does nothing to one that is. Needs a process group. A block is a child that holds lists of modules, or an element of such a child that is a list.
    """
    if is_sharded(model):
        return
    model.to(memory_format=torch.contiguous_format)  # parts of a channels-last weight are refused
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            for block in child:
                fully_shard(block, reshard_after_forward=True)
        elif any(isinstance(part, nn.ModuleList) for part in child.children()):
            fully_shard(child, reshard_after_forward=True)
    # By default what is left would stay whole after a forward pass, and the moving average would miss it.
    fully_shard(model, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def whole(tree: Tree, take: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> Tree:
    """The same nest of dicts and lists with every sharded tensor gathered; all workers must call it together. Of each tensor, whole, what
    `take` gives is kept: one after the other, so that no GPU ever holds more than one of them whole."""
    found: Any
    if isinstance(tree, DTensor):
        found = take(tree.full_tensor())
    elif torch.is_tensor(tree):
        found = take(tree)
    elif isinstance(tree, dict):
        found = type(tree)((key, whole(value, take)) for key, value in tree.items())
    elif isinstance(tree, list):
        found = [whole(value, take) for value in tree]
    else:
        found = tree
    return found


def load_whole(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load what `whole(model.state_dict())` gave, into a model that is sharded or not."""
    own = model.state_dict()
    model.load_state_dict({name: _as(own.get(name), value) for name, value in state.items()})


def load_whole_optimiser(optimiser: Any, state: dict[str, Any]) -> None:
    """Load what `whole(optimiser.state_dict())` gave; a number for each tensor, such as its moments, is cut as the tensor is."""
    tensors = [tensor for group in optimiser.param_groups for tensor in group["params"]]
    parts = {
        index: {
            name: _as(tensors[index], value)
            if torch.is_tensor(value) and value.shape == tensors[index].shape
            else value
            for name, value in each.items()
        }
        for index, each in state["state"].items()
    }
    optimiser.load_state_dict({**state, "state": parts})


def _as(like: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    if isinstance(like, DTensor):
        # Every worker has read the whole tensor and keeps its own part: nothing is sent.
        there = value.to(like.device).contiguous()
        return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)
    if like is None or like.stride() == value.stride():
        return value
    # The fused optimiser walks a weight and its moments side by side in memory; gathered ones are not channels-last.
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
