"""FSDP2: each rank keeps its rows of every parameter, and a block is whole only while it computes.

With `trainer.tensor_parallel` ranks stand in a grid, data_parallel x tensor_parallel. Those of a row see the same
samples and share projections (`model/shared_projections.py`): of these a rank keeps its rows of its share, and of all
other parameters the rows that the others of its row keep as well.

Rank 0 has the whole model in host memory, drawn from the seed, imported or read from a checkpoint; the others build
theirs on the meta device and are given their rows. So a run begins with the very weights of an unsharded one, and no
device ever holds more than its share and one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from subquad.model.block import Block
from subquad.model.language_model import LanguageModel
from subquad.model.shared_projections import shared_projections
from subquad.schema import RunConfig

CODES_PER_BLOCK = 4
"""In training and in validation, with and without documents."""


def is_sharded(config: RunConfig, world_size: int) -> bool:
    """Whether the ranks of a run share its parameters out; a rank alone keeps all of them."""
    return (config.trainer.strategy == "fsdp" or config.trainer.tensor_parallel > 1) and world_size > 1


def shard_model(model: LanguageModel, mesh: DeviceMesh, *, compiles: bool = False) -> None:
    """Split a model's parameters over a mesh of data_parallel x tensor_parallel ranks, in place.

    Projections are shared over the second axis; then all is split by rows over the first: block by block, and what lies
    outside of blocks.

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
    rows, row = mesh["data_parallel"], mesh["tensor_parallel"]
    for block in model.blocks:
        assert isinstance(block, Block)
        if row.size() > 1:
            parallelize_module(block, row, _styles(block, row.size()))
        if compiles:
            block.compile()
        fully_shard(block, mesh=rows)
    fully_shard(model, mesh=rows)
    model.to_empty(device=mesh.device_type)
    for name, tensor in model.state_dict().items():
        _fill(tensor, whole.get(name))


def _styles(block: Block, ranks: int) -> dict[str, ParallelStyle]:
    styles: dict[str, ParallelStyle] = {}
    for module, split in shared_projections(block, ranks).items():
        styles |= {f"{module}.{name}": ColwiseParallel() for name in split.columns}
        styles |= {f"{module}.{name}": RowwiseParallel() for name in split.rows}
    return styles


def average_over_row(parameters: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Give the ranks of a row one gradient of what each holds whole, and so one value for good.

    They compute the same, but not by the same sums where a kernel adds in the order in which it happens to finish.
    """
    row = mesh["tensor_parallel"]
    for parameter in parameters:
        if parameter.grad is not None and shared_axis(parameter) is None:
            gradient = rows_of(parameter.grad)
            dist.all_reduce(gradient, group=row.get_group())
            gradient /= row.size()


def clip_to_norm(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, also where parameters lie on several meshes; the norm before clipping."""
    held = [parameter for parameter in parameters if parameter.grad is not None]
    norm = total_norm(held)
    for group in _by_mesh(held):
        clip_grads_with_norm_(group, limit, norm)
    return norm


def total_norm(parameters: Iterable[Tensor]) -> Tensor:
    """sqrt( sum of |gradient|^2 ), of the gradients whole, on every rank."""
    groups = _by_mesh(parameter.grad for parameter in parameters if parameter.grad is not None)
    norms = [_norm(group) for group in groups]
    return norms[0] if len(norms) == 1 else get_total_norm(norms)


def _norm(gradients: list[Tensor]) -> Tensor:
    if gradients and isinstance(gradients[0], DTensor) and gradients[0].device_mesh.ndim == 2:
        # Every element lies on one rank of the grid, which is all ranks: one exchange, where DTensor takes two.
        square = get_total_norm([rows_of(gradient) for gradient in gradients]) ** 2
        dist.all_reduce(square)
        return square.sqrt()
    return whole_tensor(get_total_norm(gradients))


def _by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values()) or [[]]


def shared_axis(tensor: Tensor) -> int | None:
    """The axis along which the ranks of a row share a tensor; None: each of them has all of it."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.ndim == 1:
        return None
    return int(tensor.placements[1].dim)  # type: ignore[attr-defined]


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
    local, mesh = tensor.to_local(), tensor.device_mesh
    given = torch.empty(tensor.shape, dtype=tensor.dtype, device=local.device)
    if whole is not None:
        given.copy_(whole)
    dist.broadcast(given, src=0)
    axis = shared_axis(tensor)
    share = given if axis is None else given.chunk(mesh.size(1), axis)[mesh.get_local_rank(1)]
    first = mesh.get_local_rank(0) * -(-len(share) // mesh.size(0))  # as torch.chunk cuts, the last ranks may have none
    local.copy_(share[first : first + len(local)])
