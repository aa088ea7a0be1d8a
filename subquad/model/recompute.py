"""Which results of a block activation checkpointing keeps, and which the backward computes again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from subquad.model.block import Block

PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default,
    }
)
RECOMPUTE = ("all", "cheap")
"""`all`: a block keeps its input alone. `cheap`: it keeps what matrix products and operators return as well, so that
only elementwise maps, norms and copies are computed twice (selective activation checkpointing)."""


def checkpointed(block: Block, recompute: str, *arguments: Any) -> Any:
    """What the block returns, of which the backward computes some again."""
    kept: dict[str, Any] = {} if recompute == "all" else {"context_fn": _keeps_products}
    return checkpoint(block, *arguments, use_reentrant=False, **kept)


def _keeps_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    policy: Callable[..., CheckpointPolicy] = _policy
    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-any-return, no-untyped-call]


def _policy(context: object, op: Any, *arguments: object, **named: object) -> CheckpointPolicy:
    is_kept = op in PRODUCTS or getattr(op, "namespace", None) == "subquad"
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
