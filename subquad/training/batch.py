"""What a step consumes, and how samples become it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from subquad.training.sources.source import Sample


class Batch(TypedDict):
    """What a step consumes.

    Shapes:  tokens, targets: b t (int64)    sample_ids: b (int64)    cu_seqlens: documents + 1 (int32)
    `cu_seqlens` bounds the documents of the flattened b*t tokens, rows included; None if every row is one document.
    Targets are -100 where nothing is predicted; `target_bytes` is the text (bytes) behind the others, 0 if not text.
    Of a stream: `lane` gave the batch, and `place` is where it stands behind it, as JSON.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    sample_ids: Tensor
    target_bytes: int
    lane: NotRequired[int]
    place: NotRequired[str]


def batch_of_samples(samples: Sequence[Sample], sample_ids: Sequence[int], *, packed: bool) -> Batch:
    """One row each; `packed` if a sample may hold more than one document."""
    tokens = np.stack([sample.tokens for sample in samples])
    boundaries = None
    if packed:
        seq_len = tokens.shape[1]
        starts = [np.append(0, sample.document_starts) + row * seq_len for row, sample in enumerate(samples)]
        boundaries = torch.from_numpy(np.append(np.concatenate(starts), tokens.size).astype(np.int32))
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(np.stack([sample.targets for sample in samples])),
        cu_seqlens=boundaries,
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        target_bytes=sum(sample.target_bytes for sample in samples),
    )


def part_of(batch: Batch, index: int, count: int) -> Batch:
    """Part `index` of `count` of every sequence.

    Boundaries stay those of whole sequences, and bytes of text are counted by the first part alone.
    """
    part = batch.copy()
    part["tokens"] = batch["tokens"].chunk(count, dim=1)[index].contiguous()
    part["targets"] = batch["targets"].chunk(count, dim=1)[index].contiguous()
    part["target_bytes"] = 0 if index else batch["target_bytes"]
    return part
