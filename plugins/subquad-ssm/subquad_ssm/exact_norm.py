"""The norm of Mamba-3: of B and C, and of heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

EPS = 1e-5
"""As in the authors' code."""


class ExactNorm(nn.Module):
    """y = x / sqrt(mean x^2 + eps) * weight, the mean over the last axis, in fp32 or wider, and left so.

    Shapes:  x: ... shape  ->  ... shape    weight: shape, of which all but the last axis only share the call
    Source: Zhang and Sennrich 2019 (RMSNorm).
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Scale each vector."""
        exact = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(exact), x.shape[-1:], eps=EPS) * self.weight.to(exact)
