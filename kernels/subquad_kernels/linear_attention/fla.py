"""flash-linear-attention's kernels of this operator (simple GLA): chunks of 64, or one token after the other.

They have neither a write gate nor grouped heads: values are multiplied by the gate, and rounded, before the call, and
each head gets its own copy of q and k. A decay per head is repeated over tokens, because only that has a gradient.

Source: package fla-core 0.6, `fla.ops.simple_gla`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from subquad_kernels.linear_attention.definition import empty_boundaries
from subquad_kernels.torch_operator import AutogradKernel

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Outputs


def _chunked(**arguments: Any) -> Outputs:
    from fla.ops.simple_gla import chunk_simple_gla

    return _call(chunk_simple_gla, **arguments)


def _recurrent(**arguments: Any) -> Outputs:
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    return _call(fused_recurrent_simple_gla, **arguments)


CHUNKED = AutogradKernel(_chunked)
RECURRENT = AutogradKernel(_recurrent)


def _call(
    simple_gla: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    diagonal: None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Outputs:
    b, t, h, _ = v.shape
    groups = h // q.shape[2]
    if groups > 1:
        q, k = (tensor.repeat_interleave(groups, dim=2) for tensor in (q, k))
    values = v if write_gate is None else (write_gate.unsqueeze(-1) * v).to(v.dtype)
    y, final_state = simple_gla(
        q=q,
        k=k,
        v=values,
        g=None if log_decay is None else log_decay.expand(b, t, h),
        scale=scale,
        initial_state=initial_state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return y, final_state, empty_boundaries(v, q.shape[3], cu_seqlens)
