"""Vectors of length one: keys of the delta rule have it, or its state would diverge."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad_kernels.operators import gated_norm

EPS = 1e-6
"""Keeps a vector of zeros finite; the authors' value of the delta nets."""


def unit_length(x: Tensor, num_heads: int, width: int, *, eps: float = EPS) -> Tensor:
    """y = x / sqrt(|x|^2 + eps), a head each, in fp32 or wider; y has x's type.

    The norm of a head by its mean square, of which |x|^2 is n times, leaves n^1/2 y.
    Shapes:  x: b t (h n), n = width  ->  b t h n
    Source: Yang et al. 2024 (DeltaNet), section 3.
    """
    scale = x.new_full((width,), width**-0.5, dtype=torch.promote_types(x.dtype, torch.float32))
    y = gated_norm(x, weight=scale, groups=num_heads, eps=eps / width)
    return y.unflatten(2, (num_heads, width))  # type: ignore[no-any-return]
