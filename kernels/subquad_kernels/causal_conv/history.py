"""A sequence with w-1 rows of history before each document: the convolution needs no other knowledge of boundaries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad_kernels.documents import document_ids


@dataclass(frozen=True)
class History:
    """Where tokens and histories stand in the extended sequence of length `rows`; indices are None when not packed.

    Unpacked, w-1 rows stand before each sequence; packed, w-1 rows before each document, so a sum over w rows that
    ends at a token never reaches another document. Row r of the convolved sequence is the sum that ends at extended
    row r + w - 1.
    Shapes:  tokens: t    first, last: documents w-1  (the rows of history, and those that the document leaves)
    """

    width: int
    rows: int
    tokens: Tensor | None
    first: Tensor | None
    last: Tensor | None

    @classmethod
    def of(cls, t: int, width: int, cu_seqlens: Tensor | None) -> History:
        """The layout of a call."""
        if cu_seqlens is None:
            return cls(width, t + width - 1, None, None, None)
        device = cu_seqlens.device
        bounds = cu_seqlens.long()
        documents = bounds.shape[0] - 1
        tokens = torch.arange(t, device=device) + (document_ids(cu_seqlens, t) + 1) * (width - 1)
        shift = torch.arange(documents, device=device) * (width - 1)
        offsets = torch.arange(width - 1, device=device)
        first = (bounds[:-1] + shift)[:, None] + offsets
        last = (bounds[1:] + shift)[:, None] + offsets
        return cls(width, t + documents * (width - 1), tokens, first, last)

    def extend(self, x: Tensor, initial_state: Tensor | None) -> Tensor:
        """Shapes:  x: b t c    initial_state: q (w-1) c  ->  b rows c"""
        b, _, c = x.shape
        if self.tokens is None or self.first is None:
            state = x.new_zeros(b, self.width - 1, c) if initial_state is None else initial_state.to(x.dtype)
            return torch.cat([state, x], dim=1)
        extended = x.new_zeros(1, self.rows, c)
        extended.index_copy_(1, self.tokens, x)
        if initial_state is not None:
            extended.index_copy_(1, self.first.flatten(), initial_state.to(x.dtype).reshape(1, self.first.numel(), c))
        return extended

    def final_state(self, extended: Tensor) -> Tensor:
        """The last w-1 inputs of every document.  Shapes:  b rows c  ->  q (w-1) c"""
        if self.last is None:
            return extended[:, self.rows - self.width + 1 :]
        return extended[0][self.last]

    def at_tokens(self, convolved: Tensor) -> Tensor:
        """The sums that end at tokens.  Shapes:  b rows-w+1 c  ->  b t c"""
        return convolved if self.tokens is None else convolved.index_select(1, self.tokens - (self.width - 1))

    def from_tokens(self, gradient: Tensor) -> Tensor:
        """The transpose of `at_tokens`.  Shapes:  b t c  ->  b rows-w+1 c"""
        if self.tokens is None:
            return gradient
        spread = gradient.new_zeros(1, self.rows - self.width + 1, gradient.shape[2])
        return spread.index_copy_(1, self.tokens - (self.width - 1), gradient)

    def split(self, dextended: Tensor, dfinal: Tensor | None) -> tuple[Tensor, Tensor]:
        """The transpose of `extend` and `final_state`: gradients of x and of initial_state; changes `dextended`."""
        c = dextended.shape[2]
        if self.tokens is None or self.first is None or self.last is None:
            if dfinal is not None:
                dextended[:, self.rows - self.width + 1 :].add_(dfinal)
            return dextended[:, self.width - 1 :], dextended[:, : self.width - 1]
        if dfinal is not None:
            dextended.index_add_(1, self.last.flatten(), dfinal.to(dextended.dtype).reshape(1, self.last.numel(), c))
        return dextended.index_select(1, self.tokens), dextended[0][self.first]
