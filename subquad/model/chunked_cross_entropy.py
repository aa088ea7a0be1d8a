"""The loss of a language model without the logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**26
"""Logits that stand at a time: 256 MiB in float32. Less would make thin matrix products of large vocabularies."""


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits are computed together."""
    return max(1, CHUNK_LOGITS // vocab_size)


@torch.compiler.disable
def chunked_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, *, logit_cap: float = 0.0, ignored: int = -100
) -> Tensor:
    """The sum of  -log softmax(hidden head^T)[target]  in nats over the targets that are not `ignored`.

    With a `logit_cap` c > 0 logits are c tanh(logits / c). Gradients are computed in the forward, chunk by chunk of
    tokens, and scaled in the backward: nothing is computed twice, and no two chunks' logits stand side by side.
    Products are computed in autocast's dtype where it is on; all else, and the sum of the head's gradient over chunks,
    in float32 or wider. It is differentiable once. Under torch.compile it runs as written, after what is compiled: the
    order in which chunks are computed, and freed, is the point.

    Shapes:  hidden: ... d    head: v d    targets: ...   ->  scalar
    Source:  Hsu et al. 2024 (Liger Kernel), section 3.2: gradients in the forward of a fused linear cross entropy.
    """
    dtype = _dtype_of_products(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        summed: Tensor = _ChunkedCrossEntropy.apply(
            hidden.flatten(0, -2).to(dtype), head, targets.flatten(), logit_cap, ignored, torch.is_grad_enabled()
        )
    return summed


@torch.compiler.disable
@torch.no_grad()
def chunked_nats(
    hidden: Tensor, head: Tensor, targets: Tensor, *, logit_cap: float = 0.0, ignored: int = -100
) -> Tensor:
    """What `chunked_cross_entropy` sums, target by target and without a gradient; 0 where a target is `ignored`.

    Shapes:  hidden: ... d    head: v d    targets: ...   ->  ... (float32 or wider)
    """
    dtype = _dtype_of_products(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        matrix, size = head.to(dtype), chunk_tokens(len(head))
        chunks = zip(hidden.flatten(0, -2).to(dtype).split(size), targets.flatten().split(size), strict=True)
        nats = [_of_chunk(_logits(x, matrix), target, logit_cap, ignored, False)[0] for x, target in chunks]
    return torch.cat(nats).view(targets.shape)


def _dtype_of_products(hidden: Tensor) -> torch.dtype:
    """Autocast's where it is on; asked before it is switched off."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _logits(x: Tensor, matrix: Tensor) -> Tensor:
    return (x @ matrix.T).to(torch.promote_types(x.dtype, torch.float32))


def _of_chunk(logits: Tensor, targets: Tensor, cap: float, ignored: int, differentiable: bool) -> tuple[Tensor, Tensor]:
    """Nats, and the gradient of their sum,  softmax - one-hot,  by the logits, which are overwritten.

    Shapes:  logits: n v  ->  n, n v

    Where it is not asked for, the gradient is empty.
    """
    counts = (targets != ignored)[:, None]
    places = targets[:, None].where(counts, 0)
    squashed = logits.div_(cap).tanh_() if cap else None
    log_p = (logits if squashed is None else cap * squashed).log_softmax(dim=-1)
    nats = -(log_p.gather(1, places) * counts)[:, 0]
    if not differentiable:
        return nats, logits.new_empty(0)
    gradient = log_p.exp_().scatter_add_(1, places, -torch.ones_like(places, dtype=log_p.dtype)).mul_(counts)
    return nats, gradient if squashed is None else gradient.mul_(squashed.square_().neg_().add_(1))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, cap: float, ignored: int, differentiable: bool
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        for_hidden, for_head = (differentiable and needed for needed in ctx.needs_input_grad[:2])
        summed = hidden.new_zeros((), dtype=wide)
        hidden_gradient = torch.empty_like(hidden) if for_hidden else None
        head_gradient = torch.zeros_like(head, dtype=wide) if for_head else None
        matrix = head.to(hidden.dtype)
        size = chunk_tokens(len(head))
        for start in range(0, len(hidden), size):
            x, target = hidden[start : start + size], targets[start : start + size]
            nats, gradient = _of_chunk(_logits(x, matrix), target, cap, ignored, for_hidden or for_head)
            summed += nats.sum()
            gradient = gradient.to(x.dtype)
            if hidden_gradient is not None:
                torch.mm(gradient, matrix, out=hidden_gradient[start : start + size])
            if head_gradient is not None:
                head_gradient += gradient.T @ x
            del gradient  # before the next chunk's logits
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.head_dtype = head.dtype
        return summed

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        return (
            None if hidden_gradient is None else (hidden_gradient * scale).to(hidden_gradient.dtype),
            None if head_gradient is None else (head_gradient * scale).to(ctx.head_dtype),
            None,
            None,
            None,
            None,
        )
