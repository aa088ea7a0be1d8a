"""A map of low rank (RWKV's decays, rates and gates): narrow, activated, wide again."""

from __future__ import annotations

import math

from torch import Tensor, nn


class LowRank(nn.Module):
    """y = W_up act(W_down x), no biases.  Shapes:  x: ... d  ->  ... d    W_down: d -> r    W_up: r -> d"""

    def __init__(self, d_model: int, rank: int, activation: nn.Module) -> None:
        super().__init__()
        self.down = nn.Linear(d_model, rank, bias=False)
        self.activation = activation
        self.up = nn.Linear(rank, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map each token."""
        return self.widened(self.down(x))

    def widened(self, low: Tensor) -> Tensor:
        """From W_down x on.  Shapes:  low: ... r  ->  ... d"""
        return self.up(self.activation(low))  # type: ignore[no-any-return]

    def init_uniform(self, bound: float) -> None:
        """W_down zero, so that y ignores x at first; W_up uniform within +- bound (RWKV-6)."""
        nn.init.zeros_(self.down.weight)
        nn.init.uniform_(self.up.weight, -bound, bound)

    def init_orthogonal(self, gain: float) -> None:
        """W_down zero, so that y ignores x at first; W_up orthogonal, rows as long as columns (RWKV-7)."""
        nn.init.zeros_(self.down.weight)
        width, rank = self.up.weight.shape
        nn.init.orthogonal_(self.up.weight, gain=gain * math.sqrt(max(1.0, rank / width)))
