"""Rotary angles that restart with every mini-batch of test-time training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subquad_kernels.documents import document_positions


class BatchAngles(nn.Module):
    """angle_i = p theta^(-2 i / k),  p the place in a mini-batch; in fp32 or wider, the same for all heads.

    Places follow from the position in the document when packed, `position` tokens further. The authors turn neighbours,
    as `rotary` does by angles that it is given.
    Shapes:  x: b t h k  ->  b t 1 k/2
    Source: Su et al. 2021, section 3.4.2; Sun et al. 2024 (TTT), released code.
    """

    def __init__(self, head_dim: int, mini_batch: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.mini_batch, self.theta = head_dim, mini_batch, theta

    def forward(self, x: Tensor, position: int, cu_seqlens: Tensor | None) -> Tensor:
        """The angles of every token's pairs."""
        b, t = x.shape[:2]
        numbers = torch.arange(t, device=x.device) if cu_seqlens is None else document_positions(cu_seqlens, t)
        exact = torch.promote_types(x.dtype, torch.float32)
        place = (numbers + position).remainder(self.mini_batch).to(exact)
        exponents = torch.arange(0, self.head_dim, 2, device=x.device).to(exact) / self.head_dim
        return (place[:, None] * self.theta**-exponents)[:, None].expand(b, -1, -1, -1)
