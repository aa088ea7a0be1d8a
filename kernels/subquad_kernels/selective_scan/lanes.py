"""How sequences are laid out for the chunked scan: time first, and packed documents side by side where they fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad_kernels.boundaries import layout_of
from subquad_kernels.selective_scan.cuts import CHUNK

_MOST_LANES = 64
"""More lanes than this would only make the chunk's buffers larger."""


@dataclass
class Edges:
    """The first (or last) tokens of the documents that are not empty, by chunk.

    Shapes:  per chunk  rows: positions in the chunk's [t p]    owners: the documents they belong to
             boundaries: those at which one of these tokens stands
    """

    rows: tuple[Tensor, ...]
    owners: tuple[Tensor, ...]
    documents: int
    boundaries: Tensor

    def at(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Rows and documents of a chunk."""
        return self.rows[chunk], self.owners[chunk]

    def clear(self, boundaries: Tensor) -> None:
        """Zero the boundaries at which one of these tokens stands.  Shapes:  boundaries: (t-1)//16 1 n c"""
        boundaries.index_fill_(0, self.boundaries, 0)


@dataclass(frozen=True)
class Lanes:
    """`count` sequences of `length` tokens that are scanned side by side.

    Unpacked, a lane is a sequence of the batch. A packed sequence is cut into equal lanes where a document starts at
    every cut (rows of a batch laid end to end, as in training); else it is one lane.
    """

    count: int
    length: int
    packed: bool

    @classmethod
    def of(cls, b: int, t: int, cu_seqlens: Tensor | None) -> Lanes:
        """The lanes of a call."""
        if cu_seqlens is None:
            return cls(b, t, packed=False)
        return layout_of(Lanes.of_documents, cu_seqlens, t)

    @classmethod
    def of_documents(cls, bounds: tuple[int, ...], device: torch.device, t: int) -> Lanes:
        """The lanes of packed documents."""
        starts = set(bounds)
        for count in range(min(_MOST_LANES, t // CHUNK), 1, -1):
            # Whole chunks only, so that boundary k is the state at token 16 (k + 1) whatever the lanes.
            if t % (count * CHUNK) == 0 and all(cut in starts for cut in range(0, t, t // count)):
                return cls(count, t // count, packed=True)
        return cls(1, t, packed=True)

    def lay(self, tensor: Tensor) -> Tensor:
        """The kernel's view of a tensor.  Shapes:  b t ...  ->  t p ..."""
        return tensor.reshape(self.count, self.length, *tensor.shape[2:]).transpose(0, 1)

    def new_boundaries(self, rates: Tensor) -> Tensor:
        """Room for the states at chunk starts; a packed lane's first state is nobody's, and zero.

        Shapes:  rates: n c  ->  (t-1)//16 b n c
        """
        if self.packed:
            return rates.new_zeros((self.count * self.length - 1) // CHUNK, 1, *rates.shape)
        return rates.new_empty((self.length - 1) // CHUNK, self.count, *rates.shape)

    def boundary(self, boundaries: Tensor, chunk: int) -> Tensor:
        """The states that enter a chunk (not the first) of every lane, a view.  Shape: p n c"""
        if self.packed and self.count > 1:
            return boundaries[chunk - 1 :: self.length // CHUNK, 0]
        return boundaries[chunk - 1]

    def starts(self, cu_seqlens: Tensor | None) -> Edges | None:
        """The first tokens of documents; None when not packed."""
        return None if cu_seqlens is None else layout_of(_edges, cu_seqlens, self, False)

    def ends(self, cu_seqlens: Tensor | None) -> Edges | None:
        """The last tokens of documents; None when not packed."""
        return None if cu_seqlens is None else layout_of(_edges, cu_seqlens, self, True)


def _edges(bounds: tuple[int, ...], device: torch.device, lanes: Lanes, last: bool) -> Edges:
    """The last tokens of documents, or the first."""
    bound = torch.tensor(bounds)
    owners = (bound.diff() > 0).nonzero().squeeze(1)
    tokens = bound[owners + 1] - 1 if last else bound[owners]
    lane, position = tokens // lanes.length, tokens % lanes.length
    chunk = position // CHUNK
    order = chunk.argsort(stable=True)
    sizes = torch.bincount(chunk, minlength=-(-lanes.length // CHUNK)).tolist()
    rows = ((position % CHUNK) * lanes.count + lane)[order]
    boundaries = tokens[(tokens % CHUNK == 0) & (tokens > 0)] // CHUNK - 1
    return Edges(
        rows.to(device).split(sizes), owners[order].to(device).split(sizes), len(bounds) - 1, boundaries.to(device)
    )
