"""Linear attention over the tokens of both sides, with decays that the distance alone decides."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subquad import Bidirectional, MixerContext, ReversedDocuments
from subquad_kernels.operators import linear_attention


class AttendsToBothSides(Bidirectional):
    """o_i = n^-1/2 sum_j gamma_h^|i - j| (q_i . k_j) v_j:  a sum forwards, and one backwards without the token itself.

    In front of a mixer whose `_attend` is linear attention that forgets by its buffer `log_decay`, log gamma a head.
    Source: Afzal et al. 2025 (LION), section 3; constant decays are its LION-D.
    """

    log_decay: Tensor

    def __init__(self, config: Any, context: MixerContext) -> None:
        super().__init__(config, context)  # type: ignore[call-arg]
        self.backwards = ReversedDocuments()

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Shapes:  q, k: b t h n    v: b t h p  ->  b t h p, and no state"""
        earlier, _ = linear_attention(q, k, v, self.log_decay, cu_seqlens=cu_seqlens)
        q, k, v = (self.backwards(tensor, cu_seqlens) for tensor in (q, k, v))
        nothing_of_itself = q.new_zeros(()).expand(q.shape[:3])
        later, _ = linear_attention(q, k, v, self.log_decay, diagonal=nothing_of_itself, cu_seqlens=cu_seqlens)
        return earlier + self.backwards(later, cu_seqlens), None
