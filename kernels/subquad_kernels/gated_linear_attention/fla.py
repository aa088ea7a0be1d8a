"""flash-linear-attention's kernels of this operator, GLA's or RWKV-6's by `read`: in chunks, or token after token.

Source: package fla-core 0.6, `fla.ops.gla` and `fla.ops.rwkv6`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from subquad_kernels.gated_linear_attention.definition import num_cuts
from subquad_kernels.torch_operator import AutogradKernel

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Outputs


def _chunked(*, read: str, **arguments: Any) -> Outputs:
    if read == "before":
        from fla.ops.rwkv6 import chunk_rwkv6

        return _call_rwkv6(chunk_rwkv6, **arguments)
    from fla.ops.gla import chunk_gla

    return _call_gla(chunk_gla, "g", **arguments)


def _recurrent(*, read: str, **arguments: Any) -> Outputs:
    if read == "before":
        from fla.ops.rwkv6 import fused_recurrent_rwkv6

        return _call_rwkv6(fused_recurrent_rwkv6, **arguments)
    from fla.ops.gla import fused_recurrent_gla

    return _call_gla(fused_recurrent_gla, "gk", **arguments)


CHUNKED = AutogradKernel(_chunked)
RECURRENT = AutogradKernel(_recurrent)


def _call_gla(
    gla: Any, decay_name: str, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: None, **rest: Any
) -> Outputs:
    """`decay_name` is what the function calls the decay of key channels."""
    return _call(gla, q, {"q": q, "k": k, "v": v, decay_name: log_decay}, **rest)


def _call_rwkv6(
    rwkv6: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor | None, **rest: Any
) -> Outputs:
    u = k.new_zeros(k.shape[2:]) if bonus is None else bonus
    return _call(rwkv6, q, {"r": q, "k": k, "v": v, "w": log_decay, "u": u}, **rest)


def _call(
    function: Any,
    q: Tensor,
    tensors: dict[str, Tensor],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Outputs:
    y, final_state = function(
        **tensors, scale=scale, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens
    )
    (b, t, h, n), p = q.shape, y.shape[3]
    unused = final_state.new_empty(num_cuts(b, t, n, p, packed=cu_seqlens is not None), h, n, p)
    return y.to(q.dtype), final_state, unused
