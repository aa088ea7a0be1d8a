"""Where the step sizes of the Mamba family start."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST_STEP, LARGEST_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4
"""Step sizes are drawn log-uniform between the first two and not below the third (Gu and Dao 2023, section 3.6)."""


@torch.no_grad()
def draw_step_biases(bias: Tensor) -> None:
    """Fill `bias` such that softplus(bias) is log-uniform from 1e-3 to 1e-1, a draw for each entry."""
    step = torch.empty_like(bias, dtype=torch.float32)
    step.uniform_(math.log(SMALLEST_STEP), math.log(LARGEST_STEP)).exp_().clamp_(min=STEP_FLOOR)
    bias.copy_(step + (-torch.expm1(-step)).log())  # the inverse of softplus
