"""The torch op `subquad::gated_linear_attention` and the function that mixers call."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from subquad_kernels.gated_linear_attention.declaration import OPERATOR
from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.torch_operator import define

OP = define(
    OPERATOR,
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? bonus, Tensor? initial_state, Tensor? cu_seqlens,"
    " float scale, str read, str kernel) -> (Tensor, Tensor, Tensor)",
)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    read: Literal["after", "before"] = "after",
    kernel: str = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention  S_t = Diag(exp log_decay_t) S_{t-1} + k_t v_t^T,   y_t = scale S_t^T q_t.

    With read="before" (RWKV-6)  y_t = scale ( S_{t-1}^T q_t + (q_t . (bonus * k_t)) v_t ); no bonus counts as 0.

    Shapes:  q, k, log_decay: b t h n    v: b t h p    bonus: h n    cu_seqlens: documents + 1 (int32)
             initial_state: states h n p  ->  y: b t h p    final_state: states h n p (fp32; fp64 for fp64 inputs)
    log_decay is <= 0 (nats per token), of q's type or a wider one. `states` is b, or the number of documents when
    packed (then b is 1). `scale` is n^-0.5 unless given. `kernel` names a kernel or a table of kernels.
    Raises: ValueError for shapes that do not fit, and for a bonus with read="after"; CatalogueError for an unknown
    kernel.
    Source: Yang et al. 2023 (GLA), section 4; Peng et al. 2024 (RWKV-6), section 4.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    results = OP(q, k, v, log_decay, bonus, initial_state, cu_seqlens, scale, read, kernel)
    return results[0], results[1]
