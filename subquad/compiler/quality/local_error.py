"""P2, the local error: how far the student's output is from the teacher's on the teacher's own inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from subquad.compiler.quality.proxy import HeldOut, inputs_and_outputs
from subquad.model.language_model import LanguageModel


@torch.no_grad()
def local_error(model: LanguageModel, layer: int, student: nn.Module, batches: Sequence[HeldOut]) -> float:
    """q = ||o' - o||^2 / ||o||^2  over all batches; 1 is as bad as no mixer at all.

    Cheap, and blind to what later layers make of the difference.
    """
    missed = whole = 0.0
    for batch, (x, output) in zip(batches, inputs_and_outputs(model, layer, batches)):
        missed += float((student(x, batch.cu_seqlens) - output).double().square().sum())
        whole += float(output.double().square().sum())
    return missed / whole if whole else 0.0
