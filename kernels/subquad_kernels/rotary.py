"""Rotary position embedding: a rotation of pairs of features by an angle that grows with the position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subquad_kernels.documents import document_positions


class Rotary(nn.Module):
    """Rotate queries and keys by their positions; half-split pairs (i, i + head_dim / 2).

    angle(p, i) = p * theta^(-2 i / head_dim)
    (x_i, x_{i + d/2}) -> (x_i cos - x_{i + d/2} sin,  x_{i + d/2} cos + x_i sin)

    Shapes:  x: b t h k  ->  b t h k    positions count from `start`; from 0 at each document when packed.
    Source: Su et al. 2021, 3.4.2; half-split layout of GPT-NeoX.
    """

    def __init__(self, head_dim: int, theta: float = 1e6) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; rotation needs pairs of features")
        self.head_dim, self.theta = head_dim, theta

    def forward(self, q: Tensor, k: Tensor, start: int = 0, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotate both."""
        t = q.shape[1]
        # Positions beyond 2^24 and angles need float64: fp32 loses whole turns on long sequences.
        if cu_seqlens is None:
            positions = torch.arange(t, device=q.device, dtype=torch.float64) + start
        else:
            positions = document_positions(cu_seqlens, t).double()
        exponent = torch.arange(0, self.head_dim, 2, device=q.device, dtype=torch.float64) / self.head_dim
        angles = positions[:, None] * self.theta**-exponent
        exact = torch.promote_types(q.dtype, torch.float32)
        cos, sin = angles.cos().to(exact)[:, None], angles.sin().to(exact)[:, None]
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
