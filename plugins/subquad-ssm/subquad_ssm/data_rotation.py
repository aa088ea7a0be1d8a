"""The complex half of Mamba-3's state: keys and queries are turned by angles that tokens add up."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TURN = 2 * math.pi
STRETCH = 64
"""Tokens that one product with a triangle of ones adds up."""


class CumulatedAngles(nn.Module):
    """theta_t = theta_{t-1} + steps_t modulo 2 pi, from `initial` (absent: 0); from 0 at each packed document.

    Added in fp64: in fp32 a sum over a million tokens has lost the second digit of an angle. Stretches of 64 tokens are
    summed by a product with a triangle of ones, whose gradient is the product with the other one; a cumulative sum
    over t would have a thread a channel walk all of time, and turn time around twice for its gradient.
    Shapes:  steps: b t h s    initial: b h s    cu_seqlens: documents + 1 (then b = 1)  ->  b t h s, of steps' type
    """

    def forward(self, steps: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Add up."""
        _, t, h, s = steps.shape
        stretch = min(STRETCH, t)
        rows = steps.flatten(2)
        if short := -t % stretch:
            rows = F.pad(rows, (0, 0, 0, short))
        laid = rows.unflatten(1, (-1, stretch))
        whole = laid.sum(2, dtype=torch.float64)
        before = F.pad(whole, (0, 0, 1, -1)).cumsum(1)
        if initial is not None:
            before = before + initial.double().flatten(1).unsqueeze(1)
        ones = torch.ones(stretch, stretch, dtype=torch.float64, device=steps.device).tril()
        total = (ones @ laid.double() + before.unsqueeze(2)).flatten(1, 2)[:, :t].unflatten(2, (h, s))
        if cu_seqlens is not None:
            # Outputs depend on differences of angles alone, and would forgive a common start. Gradients would not: they
            # sum what later documents leave of a cancellation between rounded numbers.
            bounds = cu_seqlens.long()
            ends = F.pad(total, (0, 0, 0, 0, 1, 0))
            turned = ends[:, bounds].diff(dim=1)
            total = total - torch.zeros_like(ends).index_add(1, bounds[1:], turned)[:, :-1].cumsum(1)
        return torch.remainder(total, TURN).to(steps.dtype)
