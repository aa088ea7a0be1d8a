"""flash-linear-attention's kernels of the delta rule, one by each kind of transition: chunks, or one token (decode).

    no decay            chunk_delta_rule          (DeltaNet)
    a decay per head    chunk_gated_delta_rule    (Gated DeltaNet)
    one per key channel chunk_kda                 (Kimi Delta Attention)
    remove and insert   chunk_dplr_delta_rule     (RWKV-7): its values are multiplied by the write gate before the call

Those for one token have no backward. q and k are copied to every head where a function has no grouped heads.

Source: package fla-core 0.6, `fla.ops.delta_rule`, `gated_delta_rule`, `kda` and `generalized_delta_rule`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.delta_rule.declaration import num_chunks
from subquad_kernels.torch_operator import AutogradKernel

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Outputs


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    remove: Tensor | None,
    insert: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Outputs:
    common = _common(initial_state, cu_seqlens, scale)
    if remove is not None and insert is not None:
        from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule

        found = chunk_dplr_delta_rule(**_low_rank(q, k, v, log_decay, write_gate, remove, insert), **common)
    elif log_decay is None:
        from fla.ops.delta_rule import chunk_delta_rule

        queries, keys = _to_heads(v, q, k)
        found = chunk_delta_rule(queries, keys, v, beta=_gate(v, write_gate), **common)
    elif log_decay.dim() == 3:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        found = chunk_gated_delta_rule(q, k, v, g=log_decay, beta=_gate(v, write_gate), **common)
    else:
        from fla.ops.kda import chunk_kda

        found = chunk_kda(q, k, v, g=log_decay, beta=_gate(v, write_gate), **common)
    return _outputs(k, v, cu_seqlens, *found)


def _recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    remove: Tensor | None,
    insert: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Outputs:
    common = _common(initial_state, cu_seqlens, scale)
    if remove is not None and insert is not None:
        from fla.ops.generalized_delta_rule import fused_recurrent_dplr_delta_rule

        found = fused_recurrent_dplr_delta_rule(**_low_rank(q, k, v, log_decay, write_gate, remove, insert), **common)
    else:
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

        decay = {} if log_decay is None else {"g" if log_decay.dim() == 3 else "gk": log_decay}
        found = fused_recurrent_gated_delta_rule(q, k, v, beta=_gate(v, write_gate), **decay, **common)
    return _outputs(k, v, cu_seqlens, *found)


CHUNKED = AutogradKernel(_chunked)
RECURRENT = AutogradKernel(_recurrent)


def _common(initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float) -> dict[str, Any]:
    return {
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": True,
        "cu_seqlens": cu_seqlens,
    }


def _gate(v: Tensor, write_gate: Tensor | None) -> Tensor:
    return v.new_ones(v.shape[:3], dtype=torch.float32) if write_gate is None else write_gate


def _to_heads(v: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Shapes:  v: b t h p    tensors: b t h_k n  ->  b t h n"""
    groups = v.shape[2] // tensors[0].shape[2]
    return [tensor if groups == 1 else tensor.repeat_interleave(groups, dim=2) for tensor in tensors]


def _low_rank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    remove: Tensor,
    insert: Tensor,
) -> dict[str, Tensor]:
    """S_t = Diag(exp gk_t) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T, one decay per key channel always."""
    queries, keys = _to_heads(v, q, k)
    if log_decay is None:
        decay = torch.zeros_like(remove, dtype=torch.float32)
    else:
        decay = log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1).expand(remove.shape)
    values = v if write_gate is None else (write_gate.unsqueeze(-1) * v).to(v.dtype)
    return {"q": queries, "k": keys, "v": values, "a": remove, "b": insert, "gk": decay}


def _outputs(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, y: Tensor, final_state: Tensor) -> Outputs:
    """The residuals are room that nobody reads."""
    b, t, h, p = v.shape
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return y, final_state, torch.empty_like(v), v.new_empty(num_chunks(b, t, documents), h, p, k.shape[3])
