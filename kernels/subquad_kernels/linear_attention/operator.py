"""The torch op `subquad::linear_attention` and the functions that mixers call."""

from __future__ import annotations

from torch import Tensor

from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.linear_attention.declaration import OPERATOR
from subquad_kernels.torch_operator import define

OP = define(
    OPERATOR,
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? write_gate, Tensor? diagonal, Tensor? initial_state,"
    " Tensor? cu_seqlens, float scale, str kernel) -> (Tensor, Tensor, Tensor)",
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    write_gate: Tensor | None = None,
    diagonal: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    kernel: str = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """Linear attention  S_t = exp(g_t) S_{t-1} + w_t k_t v_t^T,  read before the token's own write, which d_t weighs.

        y_t = scale ( exp(g_t) S_{t-1}^T q_t + d_t (q_t . k_t) v_t )

    g = log_decay (<= 0; absent: 0), w = write_gate (absent: 1), d = diagonal (absent: w, that reads S_t itself).
    Shapes:  q, k: b t h_k n    v: b t h p, h a multiple of h_k    log_decay: b t h, or h    write_gate, diagonal: b t h
             initial_state: states h n p    cu_seqlens: documents + 1 (int32)
             ->  y: b t h p    final_state: states h n p (fp32; fp64 for fp64 inputs)
    `states` is b, or the number of documents when packed (then b is 1). `scale` is n^-0.5 unless given. `kernel` names
    a kernel or a table of kernels.
    Raises: ValueError for shapes or types that do not fit; CatalogueError for an unknown kernel.
    Source: Katharopoulos et al. 2020, section 3.2; Dao and Gu 2024, section 5.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    results = OP(q, k, v, log_decay, write_gate, diagonal, initial_state, cu_seqlens, scale, kernel)
    return results[0], results[1]


def linear_attention_normalizer(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None = None,
    write_gate: Tensor | None = None,
    diagonal: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    kernel: str = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """The sum of the weights that `linear_attention` gives to values: the same recurrence on v = 1.

        z_t = exp(g_t) z_{t-1} + w_t k_t,    denominator_t = scale ( exp(g_t) z_{t-1} . q_t + d_t q_t . k_t )

    Shapes:  as `linear_attention`; initial_state: states h n 1  ->  denominator: b t h    final_state: states h n 1
    h is that of the gates or of the initial state, or h_k where none is given.
    Source: Katharopoulos et al. 2020, equation 9; Beck et al. 2024 (mLSTM), section 2.3.
    """
    heads = [gate.shape[-1] for gate in (log_decay, write_gate, diagonal) if gate is not None]
    heads += [q.shape[2]] if initial_state is None else [initial_state.shape[1]]
    ones = q.new_ones(*q.shape[:2], heads[0], 1)
    y, final_state = linear_attention(
        q, k, ones, log_decay, write_gate, diagonal, initial_state, cu_seqlens, scale=scale, kernel=kernel
    )
    return y[..., 0], final_state
