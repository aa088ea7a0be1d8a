"""Somebody's library, which knows nothing of subquad: attention with its softmax written out."""

from __future__ import annotations

from torch import Tensor, nn


class Attention(nn.Module):
    """Shapes:  x: b t d    mask: t t, added to the scores  ->  b t d"""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (d_model // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) * self.scale
        if mask is not None:
            scores = scores + mask
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
