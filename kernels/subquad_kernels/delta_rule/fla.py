"""flash-linear-attention's kernels of the delta rule, one by each kind of transition: chunks, or one token (decode).

    no decay            chunk_delta_rule          (DeltaNet)
    a decay per head    chunk_gated_delta_rule    (Gated DeltaNet)
    one per key channel chunk_kda                 (Kimi Delta Attention)
    remove and insert   chunk_dplr_delta_rule     (RWKV-7): its values are multiplied by the write gate before the call

Those for one token have no backward. q and k are copied to every head where a function has no grouped heads.

Source: package fla-core 0.6, `fla.ops.delta_rule`, `gated_delta_rule`, `kda` and `generalized_delta_rule`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.delta_rule.declaration import num_chunks
from subquad_kernels.torch_operator import AutogradKernel

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Outputs


def _chunked(**arguments: Any) -> Outputs:
    decay = arguments["log_decay"]
    if arguments["remove"] is not None:
        from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule

        return _low_rank(chunk_dplr_delta_rule, **arguments)
    if decay is None:
        from fla.ops.delta_rule import chunk_delta_rule

        queries, keys = _to_heads(arguments["v"], arguments["q"], arguments["k"])
        return _gated(chunk_delta_rule, **arguments | {"q": queries, "k": keys})
    if decay.dim() == 3:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return _gated(chunk_gated_delta_rule, g=decay, **arguments)
    from fla.ops.kda import chunk_kda

    return _gated(chunk_kda, g=decay, **arguments)


def _recurrent(**arguments: Any) -> Outputs:
    decay = arguments["log_decay"]
    if arguments["remove"] is not None:
        from fla.ops.generalized_delta_rule import fused_recurrent_dplr_delta_rule

        return _low_rank(fused_recurrent_dplr_delta_rule, **arguments)
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    named = {} if decay is None else {"g" if decay.dim() == 3 else "gk": decay}
    return _gated(fused_recurrent_gated_delta_rule, **named, **arguments)


CHUNKED = AutogradKernel(_chunked)
RECURRENT = AutogradKernel(_recurrent)


def _gated(
    delta_rule: Callable[..., tuple[Tensor, Tensor]],
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    remove: None,
    insert: None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    **decay: Tensor,
) -> Outputs:
    """A call with a write gate; `decay` is `log_decay` under the function's name for it, if it takes one."""
    beta = v.new_ones(v.shape[:3], dtype=torch.float32) if write_gate is None else write_gate
    return _call(delta_rule, k, v, {"q": q, "k": k, "v": v, "beta": beta, **decay}, initial_state, cu_seqlens, scale)


def _low_rank(
    dplr: Callable[..., tuple[Tensor, Tensor]],
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    remove: Tensor,
    insert: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Outputs:
    """S_t = Diag(exp gk_t) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T, one decay per key channel always."""
    queries, keys = _to_heads(v, q, k)
    if log_decay is None:
        decay = torch.zeros_like(remove, dtype=torch.float32)
    else:
        decay = log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1).expand(remove.shape)
    values = v if write_gate is None else (write_gate.unsqueeze(-1) * v).to(v.dtype)
    tensors = {"q": queries, "k": keys, "v": values, "a": remove, "b": insert, "gk": decay}
    return _call(dplr, k, v, tensors, initial_state, cu_seqlens, scale)


def _call(
    function: Callable[..., tuple[Tensor, Tensor]],
    k: Tensor,
    v: Tensor,
    tensors: dict[str, Tensor],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Outputs:
    """The residuals are room that nobody reads."""
    y, final_state = function(
        **tensors, scale=scale, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens
    )
    b, t, h, p = v.shape
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return y, final_state, torch.empty_like(v), v.new_empty(num_chunks(b, t, documents), h, p, k.shape[3])


def _to_heads(v: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Shapes:  v: b t h p    tensors: b t h_k n  ->  b t h n"""
    groups = v.shape[2] // tensors[0].shape[2]
    return [tensor if groups == 1 else tensor.repeat_interleave(groups, dim=2) for tensor in tensors]
