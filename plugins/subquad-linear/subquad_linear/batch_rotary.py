"""Rotary positions that restart with every mini-batch of test-time training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subquad_kernels.documents import document_positions


class BatchRotary(nn.Module):
    """Pairs (x_2i, x_2i+1) turned by  p theta^(-2 i / k),  p the place in a mini-batch; angles in fp32 or wider.

    Neighbours are paired, as the authors do; the operator `rotary` pairs halves. Places follow from the position in the
    document when packed, `position` tokens further.
    Shapes:  x: b t h k  ->  b t h k
    Source: Su et al. 2021, section 3.4.2; Sun et al. 2024 (TTT), released code.
    """

    def __init__(self, head_dim: int, mini_batch: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.mini_batch, self.theta = head_dim, mini_batch, theta

    def forward(self, x: Tensor, position: int, cu_seqlens: Tensor | None) -> Tensor:
        """Turn every pair."""
        t = x.shape[1]
        numbers = torch.arange(t, device=x.device) if cu_seqlens is None else document_positions(cu_seqlens, t)
        exact = torch.promote_types(x.dtype, torch.float32)
        place = (numbers + position).remainder(self.mini_batch).to(exact)
        exponents = torch.arange(0, self.head_dim, 2, device=x.device).to(exact) / self.head_dim
        angles = (place[:, None] * self.theta**-exponents)[:, None]
        even, odd = x.to(exact).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)
