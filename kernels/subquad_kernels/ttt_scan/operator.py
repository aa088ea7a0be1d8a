"""The torch op `subquad::ttt_scan` and the function that mixers call."""

from __future__ import annotations

from torch import Tensor

from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.torch_operator import define
from subquad_kernels.ttt_scan.declaration import OPERATOR

# `position` grows by one a decoded token: a SymInt, or torch.compile would compile each length anew.
OP = define(
    OPERATOR,
    "(Tensor q, Tensor k, Tensor v, Tensor rates, Tensor token_scales, Tensor norm_weight, Tensor norm_bias,"
    " Tensor initial_state, Tensor? cu_seqlens, SymInt position, str inner, str kernel) -> (Tensor, Tensor)",
)


def ttt_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    token_scales: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    position: int = 0,
    inner: str = "linear",
    kernel: str = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """Test-time training: the state is a model f(.; W), taught to turn keys into values less keys as tokens come.

        A_i = A_{i-1} + r_i d/dW 1/2 | f(k_i; W) - (v_i - k_i) |^2,    y_i = q_i + f(q_i; W - s_i A_i)

    in mini-batches of c tokens, all of whose gradients are taken at the W that enters; the last token's W - s A enters
    the next one. f is LN of one map (`inner="linear"`) or of two with a gelu between, 4 k wide ("mlp"); the last row of
    a map is its bias. r = rates, s = token_scales, one a place of the mini-batch; `position` tokens came before.
    Shapes:  q, k, v: b t h k    rates: b t h    token_scales: c    norm_weight, norm_bias: h k
             initial_state: states 2 h s, W and A    cu_seqlens: documents + 1 (int32)
             ->  y: b t h k    final_state: states 2 h s (fp32; fp64 for fp64 inputs)
    s is k (k+1), or 4 k (k+1) + k (4k+1) for "mlp". `states` is b, or the number of documents when packed (then b is 1,
    and each document goes on from `position`). `kernel` names a kernel or a table of kernels.
    Raises: ValueError for shapes or types that do not fit; CatalogueError for an unknown kernel.
    Source: Sun et al. 2024 (Learning to (learn at test time)), sections 2.3 to 2.7.
    """
    y, final_state = OP(
        q, k, v, rates, token_scales, norm_weight, norm_bias, initial_state, cu_seqlens, position, inner, kernel
    )
    return y, final_state
