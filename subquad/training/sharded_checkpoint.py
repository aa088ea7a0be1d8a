"""A checkpoint that all ranks write together: each the rows that it holds, and rank 0 what nobody else has.

Beside the files of `checkpoint.py`, which keep what is not sharded, there is a `shard-R.safetensors` for each rank R.
Rows joined in the order of ranks are the whole tensors, so any number of ranks, or none, reads them. Where ranks share
projections the manifest says along which axis, and what those of a row hold alike the first of them writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from subquad.training.checkpoint import (
    OPTIMIZER_ROWS,
    UNFINISHED,
    WEIGHT_ROWS,
    publish,
    shard_file,
    write_manifest,
    write_rows,
    write_unsharded,
)
from subquad.training.sharding import shared_axis

Result = TypeVar("Result")


def write_sharded_checkpoint(
    folder: Path,
    step: int,
    weights: Mapping[str, Tensor],
    trainer_state: Mapping[str, Any],
    *,
    keep: int,
    tensor_parallel: int = 1,
) -> Path:
    """Write `step-N` as `write_checkpoint` does, where tensors are sharded by rows; called by all ranks.

    The folder must be one that all ranks see.
    Raises: OSError, on all ranks, where one of them cannot write; what was begun is removed.
    """
    final = folder / f"step-{step}"
    unfinished = folder / f"{UNFINISHED}{final.name}-shards"
    writes_rest = dist.get_rank() == 0
    plain, held = _apart(weights, WEIGHT_ROWS)
    optimizer, state = trainer_state["optimizer"], {}
    for index, values in optimizer["state"].items():
        state[index], own = _apart(values, f"{OPTIMIZER_ROWS}{index}/")
        held |= own
    axes = {name: axis for name, tensor in held.items() if (axis := shared_axis(tensor)) is not None}
    writes_all = dist.get_rank() % tensor_parallel == 0
    rows = {
        name: tensor.to_local().detach().to("cpu", copy=True).contiguous()
        for name, tensor in held.items()
        if writes_all or name in axes
    }

    def begin() -> None:
        if writes_rest:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    def write() -> dict[str, str]:
        digests = write_rows(unfinished / shard_file(dist.get_rank()), rows)
        if writes_rest:
            digests |= write_unsharded(unfinished, plain, {**trainer_state, "optimizer": {**optimizer, "state": state}})
        return digests

    _together(begin, unfinished)
    digests = {name: digest for part in _together(write, unfinished) for name, digest in part.items()}

    def finish() -> None:
        if writes_rest:
            shards = dist.get_world_size()
            write_manifest(
                unfinished, step, digests, tied={}, shards=shards, tensor_parallel=tensor_parallel, axes=axes
            )
            publish(unfinished, final, keep)

    _together(finish, unfinished)
    return final


def _apart(values: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """What is not sharded, and what is, by its name in the files."""
    plain = {name: value for name, value in values.items() if not isinstance(value, DTensor)}
    return plain, {f"{prefix}{name}": value for name, value in values.items() if isinstance(value, DTensor)}


def _together(action: Callable[[], Result], unfinished: Path) -> list[Result]:
    """What the action returns on each rank.  Raises: OSError, on all ranks, if it does so on one."""
    result, problem = None, None
    try:
        result = action()
    except OSError as error:
        problem = (error.errno, error.strerror, str(error.filename or unfinished))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (result, problem))
    problems = [problem for _, problem in gathered if problem is not None]
    if problems:
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(*problems[0])
    return [result for result, _ in gathered]
