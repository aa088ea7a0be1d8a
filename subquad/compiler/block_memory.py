"""What a block holds during a training step, counted on shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from subquad.compiler.example import Example
from subquad.compiler.one_block import run_block, stand_ins
from subquad.compiler.workload import autocast
from subquad.model.block import Block

BYTES_PER_PARAMETER = 16
"""Weight, gradient and the two moments of AdamW, all float32."""


def block_memory_bytes(block: Block, example: Example, checkpointing: bool, *, state: bool = True) -> tuple[int, int]:
    """What stays during a step, and what comes and goes with the block; call it under a FakeTensorMode.

    Stays: parameters with their training state (unless `state` is False), and what one forward keeps for the backward;
    with checkpointing the block's input alone stays, and the rest comes and goes.
    """
    parameters = sum(parameter.numel() for parameter in block.parameters())
    if not example.training:
        return 4 * parameters * state, 0
    b, t = example.tokens_shape
    x = torch.empty(b, t, block.norm.normalized_shape[0], requires_grad=True)
    with autocast(torch.device("cpu"), example.dtype):
        shared = stand_ins(block, x)
        kept = saved_bytes(block, lambda: run_block(block, x, None, shared), held=shared.values())
    if checkpointing:
        return BYTES_PER_PARAMETER * parameters * state + x.numel() * x.element_size(), kept
    return BYTES_PER_PARAMETER * parameters * state + kept, 0


def saved_bytes(block: nn.Module, forward: Callable[[], object], held: Iterable[Tensor] = ()) -> int:
    """The bytes that autograd keeps of a forward, each storage once; parameters, and what others hold, left out."""
    own = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *held)}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that is freed gives its address to the next one

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor), torch.enable_grad():
        alive.append(forward())  # type: ignore[arg-type]
    return sum(kept.values())
