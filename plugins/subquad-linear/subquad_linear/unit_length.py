"""Queries and keys of the delta rule have length one, or its state would diverge."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-6
"""Keeps a vector of zeros finite; the authors' value."""


class UnitLength(nn.Module):
    """y = x / sqrt(|x|^2 + eps) over the last axis, computed in fp32 or wider.  Shapes:  x: ... k  ->  ... k

    Source: Yang et al. 2024 (DeltaNet), section 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scale each vector."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return (exact * torch.rsqrt(exact.square().sum(-1, keepdim=True) + EPS)).to(x.dtype)
