"""The package flash-attn (FlashAttention-2), with windows, grouped queries and packed sequences.

Its backward is called with the log-sum-exp that our forward keeps; its autograd would compute the forward twice.

Source: package flash-attn 2.8, `flash_attn_interface`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.softmax_attention.definition import scale_of

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int, scale: float | None
) -> Outputs:
    """out and lse."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    call: dict[str, Any] = {
        "softmax_scale": scale_of(q, scale),
        "causal": causal,
        "window_size": _window(window, causal),
        "return_attn_probs": True,
    }
    if cu_seqlens is None:
        out, lse, _ = flash_attn_func(q, k, v, **call)
        return out, lse
    t, cu_seqlens = q.shape[1], cu_seqlens.contiguous()
    out, lse, _ = flash_attn_varlen_func(q[0], k[0], v[0], cu_seqlens, cu_seqlens, t, t, **call)
    return out[None], lse[None]  # packed: out is t h v, lse is h t


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """dq, dk, dv from the saved log-sum-exp."""
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_varlen_backward

    values: Any = arguments
    q, k, v, cu_seqlens = (values[name] for name in ("q", "k", "v", "cu_seqlens"))
    (out, lse), gradient = outputs, gradients[0]
    assert gradient is not None
    found = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))
    left, right = _window(values["window"], values["causal"])
    call: dict[str, Any] = {
        "dropout_p": 0.0,
        "softmax_scale": scale_of(q, values["scale"]),
        "causal": values["causal"],
        "window_size_left": left,
        "window_size_right": right,
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": True,
    }
    if cu_seqlens is None:
        _flash_attn_backward(gradient, q, k, v, out, lse, *found, **call)
    else:
        t, cu_seqlens = q.shape[1], cu_seqlens.contiguous()
        packed = [tensor[0] for tensor in (gradient, q, k, v, out, lse, *found)]
        _flash_attn_varlen_backward(*packed, cu_seqlens, cu_seqlens, t, t, **call)
    return dict(zip(("q", "k", "v"), found))


def _window(window: int, causal: bool) -> tuple[int, int]:
    """Keys to the left and right of the token; -1 is no bound."""
    return (window - 1, 0 if causal else window - 1) if window else (-1, -1)
