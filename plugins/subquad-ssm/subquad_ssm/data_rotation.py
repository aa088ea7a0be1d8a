"""The complex half of Mamba-3's state: pairs of keys and queries turned by angles that tokens add up."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TURN = 2 * math.pi


def cumulated_angles(steps: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """theta_t = theta_{t-1} + steps_t modulo 2 pi, from `initial` (absent: 0); from 0 at each packed document.

    Added in fp64: in fp32 a sum over a million tokens has lost the second digit of an angle.
    Shapes:  steps: b t h s    initial: b h s    cu_seqlens: documents + 1 (then b = 1)  ->  b t h s, of steps' type
    """
    total = steps.double().cumsum(1)
    if initial is not None:
        total = total + initial.double().unsqueeze(1)
    if cu_seqlens is not None:
        # Outputs depend on differences of angles alone, and would forgive a common start. Gradients would not: they
        # sum what later documents leave of a cancellation between rounded numbers.
        bounds = cu_seqlens.long()
        before = F.pad(total, (0, 0, 0, 0, 1, 0))
        turned = before[:, bounds].diff(dim=1)
        total = total - torch.zeros_like(before).index_add(1, bounds[1:], turned)[:, :-1].cumsum(1)
    return torch.remainder(total, TURN).to(steps.dtype)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (x_2i, x_2i+1), i < s, by their angles; what is left of x stays.

        (a, b) -> (a cos - b sin, a sin + b cos)

    Shapes:  x: ... n    angles: ... s, 2 s <= n  ->  ... n
    Source: Lahoti et al. 2026 (Mamba-3), section 3.2; Su et al. 2021, equation 34 (interleaved pairs).
    """
    turning, still = x.split([2 * angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1]], dim=-1)
    a, b = turning.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2), still], -1)
