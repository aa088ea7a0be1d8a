"""Held-out loss by position: how much a model makes of what it has read of a document.

A target's position is the number of tokens of its row and document that the model has seen, itself excluded; positions
are taken together in buckets of doubling width, 1, 2 to 3, 4 to 7, ..., as `evaluate` takes them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from subquad.training.sources.source import IGNORED

POSITION_PREFIX = "val/loss_seen/"


def position_columns(seq_len: int) -> tuple[str, ...]:
    """The names of the buckets of rows of that many tokens: `val/loss_seen/1`, `val/loss_seen/2-3`, ..."""
    firsts = [1 << power for power in range(seq_len.bit_length())]
    lasts = [min(2 * first - 1, seq_len) for first in firsts]
    spans = [f"{first}" if first == last else f"{first}-{last}" for first, last in zip(firsts, lasts, strict=True)]
    return tuple(f"{POSITION_PREFIX}{span}" for span in spans)


def tokens_seen(rows: int, length: int, cu_seqlens: Tensor | None, *, index: int = 0, count: int = 1) -> Tensor:
    """How many tokens of its row and document the model has seen at each position.  Shapes:  b t (int64)

    Of part `index` of `count` of every row, `length` tokens each; `cu_seqlens` bounds the documents of whole rows.
    """
    device = None if cu_seqlens is None else cu_seqlens.device
    places = torch.arange(index * length, (index + 1) * length, device=device).expand(rows, length)
    if cu_seqlens is None:
        return places + 1
    places = places + torch.arange(rows, device=device)[:, None] * (length * count)
    bounds = cu_seqlens.long()
    return places + 1 - bounds[torch.bucketize(places, bounds, right=True) - 1]


def by_bucket(nats: Tensor, targets: Tensor, seen: Tensor, buckets: int) -> Tensor:
    """The sum of nats, and the number of targets, in each bucket.

    Shapes:  nats, targets, seen: b t  ->  2 buckets (float64)
    """
    counts = targets != IGNORED
    firsts = 2 ** torch.arange(buckets, device=nats.device)
    places = torch.bucketize(seen.to(nats.device).flatten(), firsts, right=True) - 1
    both = torch.stack([nats.where(counts, 0).double().flatten(), counts.double().flatten()])
    return both @ one_hot(places, buckets).double()  # a product, as sums by index have no fixed order on a GPU


def mean_by_bucket(sums: Tensor, seq_len: int) -> Mapping[str, float]:
    """Nats per target of every bucket that has a target, by its column.  Shapes:  sums: 2 buckets"""
    columns = zip(position_columns(seq_len), sums[0].tolist(), sums[1].tolist(), strict=True)
    return {column: nats / count for column, nats, count in columns if count}
