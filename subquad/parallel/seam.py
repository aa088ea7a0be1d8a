"""Where a part begins among the documents of a packed sequence, without asking the device for a number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.parallel.part import SequencePart


def local_boundaries(part: SequencePart, cu_seqlens: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The boundaries of the whole sequence as they stand in the part; documents outside of it are empty there.

    Shapes:  cu_seqlens: documents + 1    tokens: 1 t ...  ->  documents + 1
    """
    if cu_seqlens is None:
        return None
    t = tokens.shape[1]
    return (cu_seqlens - part.index * t).clamp(0, t)


@dataclass(frozen=True)
class Seam:
    """The documents of a part's first and last token, and whether they go over its ends.

    Shapes:  first, last: 1, numbers of documents    continues: 1, whether `first` began before the part
             whole: 1, whether it is also the last one, so that a state passes through    in_last: t, tokens of `last`
    """

    first: Tensor
    last: Tensor
    continues: Tensor
    whole: Tensor
    in_last: Tensor
    documents: int

    @classmethod
    def of(cls, part: SequencePart, cu_seqlens: Tensor, t: int) -> Seam:
        """The seam before the part.  Shapes:  cu_seqlens: documents + 1, of the whole sequence"""
        start = part.index * t
        ends = cu_seqlens[1:].contiguous()
        at = torch.arange(start, start + t, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        first, last = (torch.searchsorted(ends, at[place : place + 1], right=True) for place in (0, t - 1))
        continues = cu_seqlens.take(first) < start
        whole = continues & (first == last)
        return cls(first, last, continues, whole, at >= cu_seqlens.take(last), len(ends))

    def placed(self, arriving: Tensor) -> Tensor:
        """What arrives, at the place of the document that goes on.  Shapes:  1 ...  ->  documents ..."""
        mask = self.continues.view(1, *(1 for _ in arriving.shape[1:]))
        empty = arriving.new_zeros(self.documents, *arriving.shape[1:])
        return empty.index_copy(0, self.first, arriving.masked_fill(~mask, 0))
