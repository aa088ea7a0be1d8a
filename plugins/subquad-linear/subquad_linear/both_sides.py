"""Linear attention over the tokens of both sides, with decays that the distance alone decides."""

from __future__ import annotations

from torch import Tensor

from subquad import ReversedDocuments
from subquad_kernels.operators import linear_attention


def attend_to_both_sides(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None, backwards: ReversedDocuments
) -> Tensor:
    """o_i = n^-1/2 sum_j gamma_h^|i - j| (q_i . k_j) v_j:  a sum forwards, and one backwards without the token itself.

    Shapes:  q, k: b t h n    v: b t h p    log_decay: h, log gamma  ->  b t h p
    Source: Afzal et al. 2025 (LION), section 3; constant decays are its LION-D.
    """
    earlier, _ = linear_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens)
    q, k, v = backwards(q, cu_seqlens), backwards(k, cu_seqlens), backwards(v, cu_seqlens)
    nothing_of_itself = q.new_zeros(()).expand(q.shape[:3])
    later, _ = linear_attention(q, k, v, log_decay, diagonal=nothing_of_itself, cu_seqlens=cu_seqlens)
    both: Tensor = earlier + backwards(later, cu_seqlens)
    return both
