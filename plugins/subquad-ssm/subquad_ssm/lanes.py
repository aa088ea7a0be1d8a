"""Linear attention of several keys, values and queries a token: one state, read and written in lanes (MIMO)."""

from __future__ import annotations

from torch import Tensor, einsum
from torch.nn.functional import pad

from subquad_kernels.operators import linear_attention


def attend_in_lanes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    write_gate: Tensor,
    diagonal: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + w_t sum_r k_t^r v_t^rT, read in every lane before the token's own writes.

        y_t^r = exp(g_t) S_{t-1}^T q_t^r + d_t sum_l (q_t^r . k_t^l) v_t^l          g = log_decay, d = diagonal

    A token becomes 2 r places of `linear_attention`: r that read, then r that write. A place reads no other lane's
    write of its token, whose weight d is applied here; half of the operator's products are with zeros.

    Shapes:  q, k: b t r h n    v: b t r h p    log_decay, write_gate, diagonal: b t h    initial_state: states h n p
             cu_seqlens: documents + 1  ->  y: b t r h p    final_state: states h n p
    Source: Lahoti et al. 2026 (Mamba-3), section 3.3.
    """
    lanes = q.shape[2]
    places = 2 * lanes
    first, last = (0, 0, 0, 0, 0, lanes), (0, 0, 0, 0, lanes, 0)  # where zeros are added: after, or before
    past, state = linear_attention(
        pad(q, first).flatten(1, 2),
        pad(k, last).flatten(1, 2),
        pad(v, last).flatten(1, 2),
        pad(log_decay.unsqueeze(2), (0, 0, 0, places - 1)).flatten(1, 2),
        write_gate.repeat_interleave(places, dim=1),
        initial_state=initial_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens * places,
        scale=1.0,
    )
    own = (diagonal[..., None, None] * einsum("btrhn,btlhn->bthrl", q, k)).to(v.dtype)
    return past.unflatten(1, (-1, places))[:, :, :lanes] + einsum("bthrl,btlhp->btrhp", own, v), state
