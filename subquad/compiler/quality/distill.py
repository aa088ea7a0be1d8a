"""Local distillation: a new mixer learns to do what the trained one does, in its place and on its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from subquad.compiler.quality.proxy import HeldOut, inputs_and_outputs
from subquad.model.language_model import LanguageModel


def distill(
    model: LanguageModel,
    layer: int,
    student: nn.Module,
    batches: Sequence[HeldOut],
    *,
    steps: int,
    learning_rate: float,
) -> float:
    """Minimise ||o' - o||^2 / ||o||^2 by Adam over the batches in turn; the last step's value.

    Only the student is trained. Its learning rate falls to 0 along a half cosine.
    """
    pairs = inputs_and_outputs(model, layer, batches)
    optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    error = torch.tensor(float("nan"))
    for step in range(steps):
        batch, (x, output) = batches[step % len(batches)], pairs[step % len(batches)]
        with torch.enable_grad():
            missed = (student(x, batch.cu_seqlens) - output).float().square().sum()
            error = missed / output.float().square().sum().clamp(min=1e-12)
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return float(error.detach())
