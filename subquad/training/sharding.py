"""FSDP2: each rank keeps its rows of every parameter, and a block is whole only while it computes.

Rank 0 has the whole model in host memory, drawn from the seed, imported or read from a checkpoint; the others build
theirs on the meta device and are given their rows. So a run begins with the very weights of an unsharded one, and no
device ever holds more than its share and one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from subquad.model.language_model import LanguageModel
from subquad.schema import RunConfig

CODES_PER_BLOCK = 4
"""In training and in validation, with and without documents."""


def is_sharded(config: RunConfig, world_size: int) -> bool:
    """Whether the ranks of a run share its parameters out; a rank alone keeps all of them."""
    return config.trainer.strategy == "fsdp" and world_size > 1


def shard_model(model: LanguageModel, mesh: DeviceMesh, *, compiles: bool = False) -> None:
    """Split a model's parameters by rows over a mesh, in place: block by block, and what lies outside of blocks.

    Rank 0's values become everybody's; on other ranks the model may be on the meta device. Weights stay float32 and are
    gathered as such, so that autocast computes what it computes on one device. With `compiles` each block goes through
    torch.compile by itself, between the exchanges. Called by all ranks.
    """
    whole = model.state_dict() if dist.get_rank() == 0 else {}
    model.to("meta")
    if compiles:
        # Each block is code of its own to dynamo, which would silently leave all but the first eight uncompiled.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, CODES_PER_BLOCK * len(model.blocks))
    for block in model.blocks:
        if compiles:
            block.compile()
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=mesh.device_type)
    for name, tensor in model.state_dict().items():
        _fill(tensor, whole.get(name))


def spread_optimizer_state(optimizer: torch.optim.Optimizer, whole: dict[str, Any] | None) -> dict[str, Any]:
    """An optimizer's state dict over sharded parameters, from that over whole ones, which rank 0 has.

    A tensor that has its parameter's shape is split as the parameter is; all else every rank has. Called by all ranks.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    outline: dict[str, Any] | None = None
    if whole is not None:
        state = {
            index: {key: _Split() if _is_split(value, parameters[index]) else value for key, value in values.items()}
            for index, values in whole["state"].items()
        }
        outline = {"state": state, "param_groups": whole["param_groups"]}
    box = [outline]
    dist.broadcast_object_list(box, src=0)
    spread = box[0]
    assert spread is not None
    for index, values in spread["state"].items():
        for key, value in values.items():
            if isinstance(value, _Split):
                values[key] = torch.empty_like(parameters[index])
                _fill(values[key], None if whole is None else whole["state"][index][key])
    return spread


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor with the rows or summands of all ranks; called by all ranks where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def holds_shards(model: nn.Module) -> bool:
    """Whether the parameters are rows of larger ones."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def rows_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Split:
    """Stands for a tensor that follows row by row."""


def _is_split(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape


@torch.no_grad()
def _fill(tensor: Tensor, whole: Tensor | None) -> None:
    """Give each rank its part of a tensor that rank 0 has whole."""
    if not isinstance(tensor, DTensor):
        if whole is not None:
            tensor.copy_(whole)
        dist.broadcast(tensor, src=0)
        return
    local = tensor.to_local()
    given = torch.empty(tensor.shape, dtype=tensor.dtype, device=local.device)
    if whole is not None:
        given.copy_(whole)
    local.copy_(distribute_tensor(given, tensor.device_mesh, tensor.placements).to_local())
