"""Drawing what operators' sample inputs share: the boundaries of packed documents, and rows of large scores."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor


def draw_boundaries(shape: Mapping[str, int], seed: int, device: str) -> Tensor | None:
    """`shape["documents"]` documents over `shape["t"]` tokens, of random lengths; None if unpacked.

    Of four and more one is empty and one is a single token, next to each other; of three one is a single token.
    Shape: documents + 1 (int32)
    """
    documents = shape.get("documents")
    if documents is None:
        return None
    draw = random.Random(seed)
    place = draw.randint(0, shape["t"] - 1)
    special = [place, place + 1, place][: documents - 1]
    cuts = sorted(special + [draw.randint(0, shape["t"]) for _ in range(documents - 1 - len(special))])
    return torch.tensor([0, *cuts, shape["t"]], dtype=torch.int32, device=device)


def draw_outliers(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Make one row in eight of what enters a score eight times as large: its softmax has one key, or nearly.

    Shape:  b t h k
    """
    rows = torch.rand(scores.shape[:-1], generator=generator, device=scores.device) < 1 / 8
    return torch.where(rows.unsqueeze(-1), 8 * scores, scores)
