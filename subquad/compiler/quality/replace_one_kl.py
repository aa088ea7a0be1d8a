"""P1, replace one: how far the whole model's predictions move when one layer's mixer is exchanged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from subquad.compiler.quality.proxy import HeldOut, exchanged
from subquad.model.language_model import LanguageModel


@torch.no_grad()
def replace_one_kl(model: LanguageModel, layer: int, student: nn.Module, batches: Sequence[HeldOut]) -> float:
    """q = E KL( p(. | x) || p'(. | x) )  in nats per token, p' with the student in that layer alone.

    Source: Puzzle (Bercovich et al. 2025). Sums over layers ignore what two exchanges do together.
    """
    total, tokens = 0.0, 0
    for batch in batches:
        before = torch.log_softmax(model(batch.tokens, batch.cu_seqlens).float(), dim=-1)
        with exchanged(model, layer, student):
            after = torch.log_softmax(model(batch.tokens, batch.cu_seqlens).float(), dim=-1)
        total += float((before.exp() * (before - after)).double().sum())
        tokens += batch.tokens.numel()
    return max(total / tokens, 0.0)
