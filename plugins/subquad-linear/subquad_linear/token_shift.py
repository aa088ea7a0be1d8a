"""Token shift (RWKV): every token next to the one before it, for a lerp between the two."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class TokenShift(nn.Module):
    """y_t = x_{t-1} - x_t, with x_0 the last token of a carry, or zeros at the first token of a sequence.

    Shapes:  x: b t d    last: b d, or None for zeros    cu_seqlens: documents + 1  ->  b t d
    Source: Peng et al. 2023 (RWKV), section 3.1.1.
    """

    def forward(self, x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """What a step back changes."""
        first = torch.zeros_like(x[:, :1]) if last is None else last.unsqueeze(1).to(x.dtype)
        before = torch.cat([first, x[:, :-1]], dim=1)
        if cu_seqlens is not None:
            # One place more than tokens: the last document, and empty ones behind it, end there.
            starts = torch.zeros(x.shape[1] + 1, dtype=torch.bool, device=x.device)
            starts = starts.index_fill(0, cu_seqlens.long(), True)[:-1]
            before = before.masked_fill(starts.unsqueeze(-1), 0)
        return before - x


def mapped_lerp(x: Tensor, change: Tensor, weight: Tensor, mix: Tensor) -> Tensor:
    """W (x + change * mu) = W x + (W * mu) change: narrow maps of several lerps in two products, no lerp in memory.

    Shapes:  x, change: b t d    weight: r d    mix: d, or r d, a lerp for each row of the map  ->  b t r
    """
    return linear(x, weight) + linear(change, weight * mix)
