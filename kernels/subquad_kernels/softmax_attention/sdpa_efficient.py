"""Torch's memory-efficient attention (from xFormers), which also computes in float32 on CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.softmax_attention.definition import close, scale_of
from subquad_kernels.softmax_attention.single_query import attended

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

_aten = torch.ops.aten
LSE_ALIGNMENT = 32
"""The operator stores its log-sum-exp with rows of this multiple."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int, scale: float | None
) -> Outputs:
    """out and lse."""
    q, k, v = close(q, k, v)

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
        out, lse, _, _ = _aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale_of(q, scale)
        )
        return out, lse

    if q.shape[1] == 1:
        return attended(q, k, v, attend)
    out, lse = attend(*_heads_first(q, k, v), causal)
    return out.transpose(1, 2), lse[:, :, : q.shape[1]]


def backward(
    arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]
) -> dict[str, Tensor | None]:
    """dq, dk, dv from the saved log-sum-exp."""
    values: Any = arguments
    q, k, v = close(values["q"], values["k"], values["v"])
    (out, lse), gradient = outputs, gradients[0]
    assert gradient is not None
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        gradient.transpose(1, 2), *_heads_first(q, k, v), None, out.transpose(1, 2), aligned_rows(lse), seed, seed, 0.0,
        [True, True, True, False], _is_causal(q, values["causal"]), scale=scale_of(q, values["scale"]),
    )  # fmt: skip
    groups = q.shape[2] // k.shape[2]
    summed = [gradient.transpose(1, 2).unflatten(2, (-1, groups)).sum(dim=3) for gradient in (dk, dv)]
    return {"q": dq.transpose(1, 2), "k": summed[0], "v": summed[1]}


def aligned_rows(lse: Tensor) -> Tensor:
    """A log-sum-exp as the backward wants it: rows that start at multiples of LSE_ALIGNMENT, filled with infinity.

    Written to fresh memory: a length that needs no filling would keep whatever strides it comes with.
    Shapes:  b h t  ->  b h (t and what is missing to a multiple)
    """
    b, h, t = lse.shape
    rows = lse.new_full((b, h, t + -t % LSE_ALIGNMENT), float("inf"))
    rows[:, :, :t] = lse
    return rows


def _is_causal(q: Tensor, causal: bool) -> bool:
    # One query stands at the last position and sees every key.
    return causal and q.shape[1] > 1


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if groups == 1:
        return q, k, v
    return q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
