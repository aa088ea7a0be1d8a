"""The torch op `subquad::log_linear_delta_rule` and the function that mixers call."""

from __future__ import annotations

from torch import Tensor

from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.log_linear_delta_rule.declaration import OPERATOR
from subquad_kernels.torch_operator import define

# `position` grows by one a decoded token: a SymInt, or torch.compile would compile each length anew.
OP = define(
    OPERATOR,
    "(Tensor q, Tensor k, Tensor v, Tensor level_scales, Tensor? log_decay, Tensor? write_gate, Tensor? initial_state,"
    " Tensor? cu_seqlens, SymInt position, float scale, str kernel) -> (Tensor, Tensor)",
)


def log_linear_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_scales: Tensor,
    log_decay: Tensor | None = None,
    write_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    position: int = 0,
    scale: float | None = None,
    kernel: str = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """The delta rule whose past lies in buckets of 1, 2, 4, .. tokens, each read with a scale of its own.

        y_t = scale sum over j <= t of  lambda_t[bits of (t xor j)] (q_t^T M_t M_{t-1} .. M_{j+1} k_j) beta_j v_j,
        M_t = exp(g_t) (I - beta_t k_t k_t^T)

    lambda = level_scales (the last one for all levels beyond), g = log_decay (<= 0; absent: 0), beta = write_gate
    (absent: 1). `position` tokens came before; a state has a slot for each bit of their number.
    Shapes:  q, k: b t h_k n    v: b t h p, h a multiple of h_k    level_scales: b t h l    log_decay: b t h, or h
             write_gate: b t h    initial_state: states m h n p    cu_seqlens: documents + 1 (int32)
             ->  y: b t h p    final_state: states m' h n p (fp32; fp64 for fp64 inputs), m' the bits of position + t
    `states` is b, or the number of documents when packed (then b is 1, and each document goes on from `position`).
    `scale` is n^-0.5 unless given. Keys are taken as they come: states stay bounded where write_gate |k|^2 <= 2.
    `kernel` names a kernel or a table of kernels.
    Raises: ValueError for shapes or types that do not fit; CatalogueError for an unknown kernel.
    Source: Guo et al. 2025 (Log-linear attention), section 3.4.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    y, final_state = OP(
        q, k, v, level_scales, log_decay, write_gate, initial_state, cu_seqlens, position, scale, kernel
    )
    return y, final_state
