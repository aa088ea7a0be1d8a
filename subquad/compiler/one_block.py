"""A block run by itself, to count or to time it, on tensors in place of what it reads of earlier layers."""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.model.block import Block


def stand_ins(block: Block, x: Tensor) -> dict[str, Tensor]:
    """What the block reads: zeros, with a gradient where x has one.  Shapes:  x: b t d  ->  b t *shape each"""
    reads = block.sharing.reads.items()
    return {name: x.new_zeros(*x.shape[:2], *tensor.shape, requires_grad=x.requires_grad) for name, tensor in reads}


def run_block(
    block: Block, x: Tensor, cu_seqlens: Tensor | None, shared: dict[str, Tensor], *, checkpointing: bool = False
) -> Tensor:
    """The block's output; what it publishes is dropped.  Shapes:  x: b t d  ->  b t d"""
    arguments = (x, cu_seqlens, shared) if block.sharing else (x, cu_seqlens)
    found = checkpoint(block, *arguments, use_reentrant=False) if checkpointing else block(*arguments)
    return found[0] if block.sharing else found  # type: ignore[no-any-return]
