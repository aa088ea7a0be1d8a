"""Packed sequences as padded batches: documents of similar length are laid side by side, at most twice their size."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from subquad_kernels.boundaries import layout_of


@dataclass(frozen=True)
class DocumentGroup:
    """Documents whose lengths share a power of two, as the host knows them.

    Shapes:  tokens: n l  (positions in the packed sequence, clamped where a row is padding)    real: n l
             documents: n, their numbers    slots: where `real` is true, in the flattened n l    places: tokens there
    """

    tokens: Tensor
    real: Tensor
    documents: Tensor
    slots: Tensor
    places: Tensor
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    numbers: tuple[int, ...]
    _runs: dict[int, tuple[tuple[Tensor, Tensor], ...]] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(numbers: tuple[int, ...], bounds: tuple[int, ...], device: torch.device) -> DocumentGroup:
        """The documents of these numbers."""
        starts = tuple(bounds[number] for number in numbers)
        lengths = tuple(bounds[number + 1] - bounds[number] for number in numbers)
        start, length = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
        offsets = torch.arange(max(lengths))
        tokens, real = start + torch.minimum(offsets, length - 1), offsets < length
        return DocumentGroup(
            tokens=tokens.to(device),
            real=real.to(device),
            documents=torch.tensor(numbers).to(device),
            slots=real.flatten().nonzero()[:, 0].to(device),
            places=tokens[real].to(device),
            starts=starts,
            lengths=lengths,
            numbers=numbers,
        )

    @property
    def whole(self) -> bool:
        """Whether no row is padded."""
        return min(self.lengths) == max(self.lengths)

    def pad(self, packed: Tensor) -> Tensor:
        """Lay the group's documents side by side, zeros after their ends.  Shapes:  packed: 1 t ...  ->  n l ..."""
        rows: Tensor = packed[0].index_select(0, self.tokens.reshape(-1)).unflatten(0, self.tokens.shape)
        if self.whole:
            return rows
        real = self.real.reshape(*self.real.shape, *(1 for _ in rows.shape[2:]))
        return rows * real.to(rows.dtype)

    def write(self, packed: Tensor, padded: Tensor) -> None:
        """Write the real rows of `padded` to their places.  Shapes:  packed: 1 t ...    padded: n l ..."""
        packed[0, self.places] = padded.flatten(0, 1)[self.slots].to(packed.dtype)

    def runs(self, size: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """Of every `size` columns, the last ones perhaps fewer: `slots` in their flattened rows, and `places`."""
        if size not in self._runs:
            self._runs[size] = self._runs_of(size)
        return self._runs[size]

    @torch.inference_mode(False)  # they outlive it, and are saved for gradients then
    def _runs_of(self, size: int) -> tuple[tuple[Tensor, Tensor], ...]:
        device, width = self.tokens.device, max(self.lengths)
        row, column = (torch.arange(width) < torch.tensor(self.lengths)[:, None]).nonzero(as_tuple=True)
        run = column // size
        slots = row * (width - run * size).clamp(max=size) + column % size
        places = torch.tensor(self.starts)[row] + column
        order, counts = run.argsort(stable=True), run.bincount().tolist()
        return tuple(zip(slots[order].to(device).split(counts), places[order].to(device).split(counts), strict=True))


def document_groups(cu_seqlens: Tensor) -> tuple[DocumentGroup, ...]:
    """The documents of a packed sequence, grouped by length; empty documents are in no group.

    Shapes:  cu_seqlens: documents + 1
    """
    return layout_of(groups_of, cu_seqlens)


def groups_of(bounds: tuple[int, ...], device: torch.device) -> tuple[DocumentGroup, ...]:
    """The same from boundaries that the host knows."""
    # 1, 2, 3-4, 5-8, ...: the smallest power of two that holds the document.
    alike: dict[int, list[int]] = defaultdict(list)
    for number, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            alike[(stop - start - 1).bit_length()].append(number)
    return tuple(DocumentGroup.of(tuple(alike[size]), bounds, device) for size in sorted(alike))


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
