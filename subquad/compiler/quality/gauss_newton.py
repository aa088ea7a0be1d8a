"""P9, the Gauss-Newton error: the local error weighed by how the model's loss answers to the layer's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from subquad.compiler.quality.proxy import HeldOut, mixer_calls
from subquad.model.language_model import LanguageModel


def gauss_newton(model: LanguageModel, layer: int, student: nn.Module, batches: Sequence[HeldOut]) -> float:
    """q = 1/2 E_rows (g . d)^2   with  d = o' - o  and  g = d(mean cross entropy of the row) / d o,  in nats^2.

    The empirical Fisher matrix of one row is g g^T. One forward and backward per batch, no training of the whole.
    """
    total, rows = 0.0, 0
    for batch in batches:
        with mixer_calls(model, layer) as calls, torch.enable_grad():
            logits = model(batch.tokens, batch.cu_seqlens)
            x, output = calls[0]
            predicted = (batch.targets >= 0).sum(dim=1).clamp(min=1)
            nats = cross_entropy(
                logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=-100, reduction="none"
            )
            # A row's loss is no other row's concern: the gradient of their sum holds every row's own.
            (gradient,) = torch.autograd.grad((nats.view_as(batch.targets).sum(dim=1) / predicted).sum(), output)
        with torch.no_grad():
            difference = student(x, batch.cu_seqlens) - output
            per_row = (gradient.double() * difference.double()).reshape(len(batch.tokens), -1).sum(dim=1)
        total += float(per_row.square().sum())
        rows += len(batch.tokens)
    return total / (2 * rows)
