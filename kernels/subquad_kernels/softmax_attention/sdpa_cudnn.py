"""cuDNN's fused attention, as torch offers it; on Hopper usually the fastest for full causal attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.softmax_attention.definition import close, scale_of
from subquad_kernels.softmax_attention.single_query import attended

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

_aten = torch.ops.aten


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int, scale: float | None
) -> Outputs:
    """out and lse."""
    q, k, v = close(q, k, v)

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale_of(q, scale)
        )
        return out, lse.reshape(q.shape[:3])

    if q.shape[1] == 1:
        return attended(q, k, v, attend)
    out, lse = attend(*_heads_first(q, k, v), causal)
    return out.transpose(1, 2), lse


def backward(
    arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]
) -> dict[str, Tensor | None]:
    """dq, dk, dv from the saved log-sum-exp."""
    values: Any = arguments
    q, k, v = close(values["q"], values["k"], values["v"])
    (out, lse), gradient = outputs, gradients[0]
    assert gradient is not None
    groups = q.shape[2] // k.shape[2]
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
        gradient.transpose(1, 2), *_heads_first(q, k, v), out.transpose(1, 2), lse.unsqueeze(-1), seed, seed, None,
        None, None, q.shape[1], k.shape[1], 0.0, values["causal"] and q.shape[1] > 1,
        scale=scale_of(q, values["scale"]),
    )  # fmt: skip
    summed = [gradient.transpose(1, 2).unflatten(2, (-1, groups)).sum(dim=3) for gradient in (dk, dv)]
    return {"q": dq.transpose(1, 2), "k": summed[0], "v": summed[1]}


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if groups == 1:
        return q, k, v
    return q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
