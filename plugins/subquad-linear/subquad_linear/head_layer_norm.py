"""How the LSTMs leave their heads: each centred and scaled by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm


class HeadLayerNorm(nn.Module):
    """y = (x - mean x) / sqrt(var x + eps) * weight, each head by itself, in fp32 or wider; y has the type of x.

    Shapes:  x: b t h p  ->  b t (h p)    weight: h p
    Source: Beck et al. 2024 (xLSTM), figures 10 and 11; Ba et al. 2016.
    """

    def __init__(self, num_heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_heads * width))

    def forward(self, x: Tensor) -> Tensor:
        """Centre and scale each head."""
        exact = torch.promote_types(x.dtype, torch.float32)
        normal = layer_norm(x.to(exact), x.shape[-1:], eps=self.eps).flatten(-2)
        return (normal * self.weight.to(exact)).to(x.dtype)
