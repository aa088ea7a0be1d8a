"""The torch op `subquad::delta_rule` and the function that mixers call."""

from __future__ import annotations

from torch import Tensor

from subquad_kernels.delta_rule.declaration import OPERATOR
from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.torch_operator import define

OP = define(
    OPERATOR,
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? write_gate, Tensor? remove, Tensor? insert,"
    " Tensor? initial_state, Tensor? cu_seqlens, float scale, str kernel) -> (Tensor, Tensor, Tensor, Tensor)",
)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    write_gate: Tensor | None = None,
    remove: Tensor | None = None,
    insert: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    kernel: str = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """Delta rule  S_t = e^g S_{t-1} + k_t u_t^T,   u_t = beta_t (v_t - e^g S_{t-1}^T k_t),   y_t = scale S_t^T q_t.

    With `remove` and `insert`:  S_t = Diag(e^g) S_{t-1} + insert_t (remove_t^T S_{t-1}) + beta_t k_t v_t^T.

    Shapes:  q, k: b t h_k n (h_k divides h)    v: b t h p    log_decay: b t h or b t h n (<= 0)    write_gate: b t h
             remove, insert: b t h n (both or neither)    cu_seqlens: documents + 1 (int32)
             initial_state: states h n p  ->  y: b t h p    final_state: states h n p (fp32; fp64 for fp64 inputs)
    `states` is b, or the number of documents when packed (then b is 1). log_decay is 0 and write_gate 1 where absent;
    scale is n^-0.5 unless given. Keys are taken as they come: states stay bounded where write_gate |k|^2 <= 2.
    `kernel` names a kernel or a table of kernels.
    Raises: ValueError for shapes or types that do not fit; CatalogueError for an unknown kernel.
    Source: Yang et al. 2024 (DeltaNet), section 3; Yang, Kautz and Hatamizadeh 2024 (Gated DeltaNet), section 3;
            Peng et al. 2025 (RWKV-7), section 4.
    """
    factor = k.shape[-1] ** -0.5 if scale is None else scale
    results = OP(q, k, v, log_decay, write_gate, remove, insert, initial_state, cu_seqlens, factor, kernel)
    return results[0], results[1]
