"""The norm of what a state was asked: sums that grow with t, brought back to size one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

EPS = 1e-6
"""As in the authors' released models."""


class ExactNorm(nn.Module):
    """y = x / sqrt(mean x^2 + eps) * weight over the last axis, in fp32 or wider; y has the type of x.

    nn.RMSNorm leaves its fused path where the input is bf16 and the weight fp32, as under autocast.
    Shapes:  x: ... p  ->  ... p    weight: p, or none where not `affine`
    Source: Zhang and Sennrich 2019 (RMSNorm).
    """

    def __init__(self, width: int, *, affine: bool = True) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def reset_parameters(self) -> None:
        """The weight becomes 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Scale each vector."""
        exact = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(exact)
        return rms_norm(x.to(exact), (self.width,), weight, EPS).to(x.dtype)
