"""RWKV's norm of what a state was asked: each head centred and scaled by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 64e-5
"""The authors' value: 1e-5 times the square of 8."""


class HeadGroupNorm(nn.Module):
    """y = (x - mean x) / sqrt(var x + eps) * weight + bias, each head by itself, in fp32 or wider; y has x's type.

    Shapes:  x: b t h p  ->  b t (h p)    weight, bias: h p
    Source: Peng et al. 2024 (Eagle and Finch), section 4; Wu and He 2018 (group norm).
    """

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads * width))
        self.bias = nn.Parameter(torch.zeros(num_heads * width))

    def init_parameters(self, weight: float) -> None:
        """One weight for all channels, no bias."""
        nn.init.constant_(self.weight, weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Centre and scale each head."""
        exact = torch.promote_types(x.dtype, torch.float32)
        normal = F.layer_norm(x.to(exact), x.shape[-1:], eps=EPS).flatten(-2)
        return (normal * self.weight.to(exact) + self.bias.to(exact)).to(x.dtype)
