"""Torch's own flash attention: `_for_cpu` on CPUs, FlashAttention-2 (variable length, windows) on CUDA.

The aten operators are called directly, because they hand out the log-sum-exp that the backward needs; torch's public
function would compute the forward twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.documents import document_groups
from subquad_kernels.softmax_attention.definition import close, scale_of, visible
from subquad_kernels.softmax_attention.single_query import attended

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

_aten = torch.ops.aten


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int, scale: float | None
) -> Outputs:
    """out and lse."""
    q, k, v = close(q, k, v)
    factor = scale_of(q, scale)
    if q.device.type == "cuda":
        return _cuda_forward(q, k, v, cu_seqlens, causal, window, factor)
    if cu_seqlens is None:
        return _cpu_forward(q, k, v, causal, window, factor)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(1, q.shape[1], q.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
    for group in document_groups(cu_seqlens):
        mask = None if causal else group.real
        part, part_lse = _cpu_forward(group.pad(q), group.pad(k), group.pad(v), causal, window, factor, mask)
        group.write(out, part)
        group.write(lse, part_lse.transpose(1, 2))
    return out, lse.transpose(1, 2)


def backward(
    arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]
) -> dict[str, Tensor | None]:
    """dq, dk, dv from the saved log-sum-exp."""
    values: Any = arguments
    q, k, v = close(values["q"], values["k"], values["v"])
    cu_seqlens = values["cu_seqlens"]
    causal, window, factor = values["causal"], values["window"], scale_of(q, values["scale"])
    (out, lse), gradient = outputs, gradients[0]
    assert gradient is not None
    if q.device.type == "cuda":
        found = _cuda_backward(gradient, q, k, v, out, lse, cu_seqlens, causal, window, factor)
    elif cu_seqlens is None:
        found = _cpu_backward(gradient, q, k, v, out, lse, causal, window, factor)
    else:
        found = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        by_token = lse.transpose(1, 2)
        for group in document_groups(cu_seqlens):
            mask = None if causal else group.real
            parts = _cpu_backward(
                group.pad(gradient), group.pad(q), group.pad(k), group.pad(v), group.pad(out),
                group.pad(by_token).transpose(1, 2), causal, window, factor, mask,
            )  # fmt: skip
            for whole, part in zip(found, parts):
                group.write(whole, part)
    return dict(zip(("q", "k", "v"), found))


def _cpu_mask(
    q: Tensor, k: Tensor, causal: bool, window: int, real: Tensor | None
) -> tuple[bool, Tensor | None]:
    """What the CPU operator is told: (is_causal, additive mask or None).  Shape of real: b s"""
    t, s = q.shape[1], k.shape[1]
    if real is None and (not causal or t == 1 or t == s) and (not window or window >= s):
        return causal and t > 1, None
    seen = visible(t, s, None, causal, window, q.device)[None, None]
    if real is not None:
        # A padded query sees itself, so that no row is empty; its gradient is zero.
        seen = (seen & real[:, None, None, :]) | torch.eye(t, s, dtype=torch.bool, device=q.device)
    return False, torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, float("-inf"))


def _heads_first(tensor: Tensor, groups: int) -> Tensor:
    tensor = tensor.transpose(1, 2)
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, factor: float, real: Tensor | None = None
) -> Outputs:
    groups = q.shape[2] // k.shape[2]
    is_causal, mask = _cpu_mask(q, k, causal, window, real)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=factor
        )

    if q.shape[1] == 1 and mask is None:
        return attended(q, k, v, attend)
    out, lse = attend(q.transpose(1, 2), _heads_first(k, groups), _heads_first(v, groups))
    return out.transpose(1, 2), lse


def _cpu_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    window: int,
    factor: float,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[2] // k.shape[2]
    is_causal, mask = _cpu_mask(q, k, causal, window, real)
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient.transpose(1, 2), q.transpose(1, 2), _heads_first(k, groups), _heads_first(v, groups),
        out.transpose(1, 2), lse, 0.0, is_causal, attn_mask=mask, scale=factor,
    )  # fmt: skip
    return dq.transpose(1, 2), _sum_groups(dk, groups), _sum_groups(dv, groups)


def _sum_groups(gradient: Tensor, groups: int) -> Tensor:
    gradient = gradient.transpose(1, 2)
    return gradient if groups == 1 else gradient.unflatten(2, (-1, groups)).sum(dim=3)


def _cuda_bounds(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int) -> dict[str, Any]:
    # FlashAttention aligns the causal mask to the last key, as we do; -1 is no bound.
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    return {
        "cum_seq_q": cu_seqlens,
        "cum_seq_k": cu_seqlens,
        "max_q": q.shape[1],
        "max_k": k.shape[1],
        "dropout_p": 0.0,
        "is_causal": causal,
        "window_size_left": window - 1 if window else None,
        "window_size_right": (0 if causal else window - 1) if window else None,
    }


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int, factor: float
) -> Outputs:
    bounds = _cuda_bounds(q, k, cu_seqlens, causal, window)
    if cu_seqlens is not None:
        q, k, v = q[0], k[0], v[0]
    out, lse, *_ = _aten._flash_attention_forward(
        q, k, v, bounds["cum_seq_q"], bounds["cum_seq_k"], bounds["max_q"], bounds["max_k"], 0.0, bounds["is_causal"],
        False, scale=factor, window_size_left=bounds["window_size_left"],
        window_size_right=bounds["window_size_right"],
    )  # fmt: skip
    if cu_seqlens is not None:
        # Packed: out is t h v, lse is h t.
        return out[None], lse[None]
    return out, lse


def _cuda_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds = _cuda_bounds(q, k, cu_seqlens, causal, window)
    packed = cu_seqlens is not None
    if packed:
        gradient, q, k, v, out, lse = (tensor[0] for tensor in (gradient, q, k, v, out, lse))
    # No dropout: the random state is never read.
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    dq, dk, dv = _aten._flash_attention_backward(
        gradient, q, k, v, out, lse, bounds["cum_seq_q"], bounds["cum_seq_k"], bounds["max_q"], bounds["max_k"], 0.0,
        bounds["is_causal"], random_state, unused, scale=factor, window_size_left=bounds["window_size_left"],
        window_size_right=bounds["window_size_right"],
    )  # fmt: skip
    return (dq[None], dk[None], dv[None]) if packed else (dq, dk, dv)
