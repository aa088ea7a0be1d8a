"""Model FLOPs utilisation: which share of the device's matrix products a run needs for its model.

    mfu = tokens/s of one device * (6 N + operators) / ceiling

N are the parameters that multiply every token (an embedding of its own, which is looked up, does not), 6 N the FLOPs of
a token, forward and backward (Chowdhery et al. 2022, PaLM, appendix B). `operators` are the products inside operators
per token, as the chosen kernels take them. What activation checkpointing computes again does not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from subquad.compiler.choice_map import node_rows
from subquad.compiler.plan import Plan
from subquad.compiler.target import Target, is_same_model
from subquad.model.language_model import LanguageModel
from subquad_cost_model import load_device, shipped_devices


@dataclass(frozen=True)
class Utilisation:
    """What a token costs, and how many FLOPs a second one device has at most."""

    flops_per_token: float
    flops_per_s: float

    def at(self, tokens_per_s: float) -> float:
        """The utilisation of a device that learns from so many tokens a second."""
        return tokens_per_s * self.flops_per_token / self.flops_per_s


def utilisation(model: LanguageModel, plan: Plan, target: Target) -> Utilisation | None:
    """For the products of the plan's dtype; None where nobody knows the device's ceiling for them."""
    flops_per_s = ceiling(target, str(plan.example["dtype"]))
    tokens = math.prod(plan.example["tokens_shape"])
    return Utilisation(flops_per_token(model, plan, tokens), flops_per_s) if flops_per_s else None


def flops_per_token(model: LanguageModel, plan: Plan, tokens: int) -> float:
    """6 N + operators, where the plan's operators work on so many tokens."""
    multiplying = sum(parameter.numel() for parameter in model.parameters())
    if model.lm_head is not None:
        multiplying -= model.embedding.weight.numel()
    return 6 * multiplying + operator_flops(plan) / tokens


def operator_flops(plan: Plan) -> int:
    """Of the matrix products inside operators, in one micro-batch, forward and backward."""
    return sum(row.matmul_flops for choice in plan.choices if choice.used for row in node_rows(choice, choice.chosen))


def ceiling(target: Target, dtype: str) -> float | None:
    """FLOPs a second of matrix products: of the data sheet if one is shipped, else as they were probed."""
    sheets = (load_device(name) for name in shipped_devices())
    known = next((sheet for sheet in sheets if is_same_model(sheet.name, target.device.name)), target.device)
    return known.matmul_flops_per_s.get(dtype)
