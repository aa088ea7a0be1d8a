"""Packed sequences as padded batches: documents of similar length are laid side by side, at most twice their size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DocumentGroup:
    """Documents whose lengths share a power of two.

    Shapes:  tokens: n l  (positions in the packed sequence, clamped where a row is padding)    real: n l
             documents: n, their numbers
    """

    tokens: Tensor
    real: Tensor
    documents: Tensor

    def pad(self, packed: Tensor) -> Tensor:
        """Lay the group's documents side by side, zeros after their ends.  Shapes:  packed: 1 t ...  ->  n l ..."""
        rows: Tensor = packed[0].index_select(0, self.tokens.reshape(-1)).unflatten(0, self.tokens.shape)
        if bool(self.real.all()):
            return rows
        real = self.real.reshape(*self.real.shape, *(1 for _ in rows.shape[2:]))
        return rows * real.to(rows.dtype)

    def write(self, packed: Tensor, padded: Tensor) -> None:
        """Write the real rows of `padded` to their places.  Shapes:  packed: 1 t ...    padded: n l ..."""
        packed[0, self.tokens[self.real]] = padded[self.real].to(packed.dtype)


def document_groups(cu_seqlens: Tensor) -> Iterator[DocumentGroup]:
    """The documents of a packed sequence, grouped by length; empty documents are in no group.

    Shapes:  cu_seqlens: documents + 1
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    # 1, 2, 3-4, 5-8, ...: the smallest power of two that holds the document.
    size_class = torch.where(lengths > 0, (2 * lengths - 1).clamp(min=1).log2().floor(), -1.0)
    for size in size_class.unique().tolist():
        if size < 0:
            continue
        chosen = size_class == size
        start, length = starts[chosen, None], lengths[chosen, None]
        offsets = torch.arange(int(length.max()), device=cu_seqlens.device)
        yield DocumentGroup(start + torch.minimum(offsets, length - 1), offsets < length, chosen.nonzero()[:, 0])


def document_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """The number of the document each token belongs to.  Shapes:  cu_seqlens: documents + 1  ->  length"""
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)


def document_positions(cu_seqlens: Tensor, length: int) -> Tensor:
    """The position of each token in its document.  Shapes:  cu_seqlens: documents + 1  ->  length"""
    tokens = torch.arange(length, device=cu_seqlens.device)
    return tokens - cu_seqlens.long()[document_ids(cu_seqlens, length)]


def check_cu_seqlens(cu_seqlens: object, batch: int) -> None:
    """Raise ValueError unless boundaries are int32, of one dimension, and the batch is 1."""
    if not isinstance(cu_seqlens, Tensor):
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, not int32 [documents + 1] with a document"
        )
    if batch != 1:
        raise ValueError(f"a packed sequence has batch 1, not {batch}: flatten b t to 1 (b t)")
