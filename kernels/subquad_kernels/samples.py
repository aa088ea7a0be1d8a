"""Drawing what every operator's sample inputs share: the boundaries of packed documents."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor


def draw_boundaries(shape: Mapping[str, int], seed: int, device: str) -> Tensor | None:
    """`shape["documents"]` documents over `shape["t"]` tokens, of random lengths, some perhaps empty; None if unpacked.

    Shape: documents + 1 (int32)
    """
    documents = shape.get("documents")
    if documents is None:
        return None
    draw = random.Random(seed)
    cuts = sorted(draw.randint(0, shape["t"]) for _ in range(documents - 1))
    return torch.tensor([0, *cuts, shape["t"]], dtype=torch.int32, device=device)
