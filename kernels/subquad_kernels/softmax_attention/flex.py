"""FlexAttention: the mask is a function, compiled into a Triton kernel that skips tiles nobody sees."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from subquad_kernels.documents import document_ids
from subquad_kernels.softmax_attention.definition import close, scale_of

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

MOST_SHAPES = 4096
"""How many shapes are compiled for, seconds each."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int, scale: float | None
) -> Outputs:
    """out and lse."""
    with torch.no_grad():
        return _attend(q, k, v, cu_seqlens, causal, window, scale)


def backward(
    arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]
) -> dict[str, Tensor | None]:
    """dq, dk, dv: FlexAttention hides its backward behind autograd, so its forward runs once more."""
    values: Any = arguments
    with torch.enable_grad():
        inputs = [values[name].detach().requires_grad_() for name in ("q", "k", "v")]
        rest = [values[name] for name in ("cu_seqlens", "causal", "window", "scale")]
        out, _ = _attend(*inputs, *rest)
        found = torch.autograd.grad(out, inputs, gradients[0])
    return dict(zip(("q", "k", "v"), found))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    q, k, v = close(q, k, v)
    t, s = q.shape[1], k.shape[1]
    seen = mask_function(t, s, cu_seqlens, causal, window)
    with warnings.catch_warnings():
        # Triton and inductor warn about their own future; nothing the caller could mend.
        warnings.simplefilter("ignore")
        mask = create_block_mask(seen, None, None, t, s, device=q.device)
        attention: Any = _compiled if q.device.type == "cuda" else flex_attention
        out, lse = attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, scale=scale_of(q, scale),
            enable_gqa=q.shape[2] != k.shape[2], return_lse=True,
        )  # fmt: skip
    return out.transpose(1, 2), lse


def mask_function(
    t: int, s: int, cu_seqlens: Tensor | None, causal: bool, window: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`(batch, head, query, key) -> visible`, as FlexAttention asks for it."""
    shift = s - t
    documents = None if cu_seqlens is None else document_ids(cu_seqlens, s)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query + shift
        visible = key >= 0
        if causal:
            visible = visible & (key <= position)
        if window:
            visible = visible & ((position - key).abs() < window)
        if documents is not None:
            visible = visible & (documents[position] == documents[key])
        return visible

    return seen


def _compiled(*arguments: Any, **named: Any) -> Any:
    # Beyond a limit (8 shapes) torch would run the function as written, with all scores in memory, and only warn.
    with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, accumulated_recompile_limit=MOST_SHAPES):
        return _compiler()(*arguments, **named)


@lru_cache(maxsize=1)
def _compiler() -> Any:
    return torch.compile(flex_attention, dynamic=False)
