"""Model FLOPs utilisation: which share of the device's matrix products a run needs for its model.

    mfu = tokens/s of one device * (6 N + operators) / ceiling

N are the parameters that multiply every token (an embedding of its own, which is looked up, does not), 6 N the FLOPs of
a token, forward and backward (Chowdhery et al. 2022, PaLM, appendix B). `operators` are the products inside operators
per token, as the chosen kernels take them. What activation checkpointing computes again does not count, and of ranks
that share sequences or projections each does its part of a token's work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from subquad.compiler.choice_map import node_rows
from subquad.compiler.plan import NodeChoice, Plan
from subquad.compiler.target import Target, is_same_model
from subquad.model.language_model import LanguageModel
from subquad.model.shared_projections import shared_projections
from subquad.schema import TrainerConfig
from subquad_cost_model import load_device, shipped_devices


@dataclass(frozen=True)
class Utilisation:
    """What a token costs, and how many FLOPs a second one device has at most."""

    flops_per_token: float
    flops_per_s: float

    def at(self, tokens_per_s: float) -> float:
        """The utilisation of a device that learns from so many tokens a second."""
        return tokens_per_s * self.flops_per_token / self.flops_per_s


def utilisation(
    model: LanguageModel, plan: Plan, target: Target, trainer: TrainerConfig | None = None
) -> Utilisation | None:
    """For the products of the plan's dtype; None where nobody knows the device's ceiling for them.

    The plan is that of one of the ranks that `trainer` tells of (default: one device).
    """
    flops_per_s = ceiling(target, str(plan.example["dtype"]))
    return Utilisation(flops_per_token(model, plan, trainer), flops_per_s) if flops_per_s else None


def flops_per_token(model: LanguageModel, plan: Plan, trainer: TrainerConfig | None = None) -> float:
    """6 N + operators.

    The plan's operators work on the last part of sequences that ranks share, which sees all tokens before it: what a
    token costs on average over ranks is what it costs in a whole sequence. Of heads they are given a rank's share.
    """
    multiplying = sum(parameter.numel() for parameter in model.parameters())
    if model.lm_head is not None:
        multiplying -= model.embedding.weight.numel()
    parts, sharing = (1, 1) if trainer is None else (trainer.context_parallel, trainer.tensor_parallel)
    shares = {
        int(block.layer_index): sharing if "mixer" in shared_projections(block, sharing) else 1  # type: ignore[arg-type]
        for block in model.blocks
    }
    tokens = int(math.prod(plan.example["tokens_shape"])) * parts
    return 6 * multiplying + operator_flops(plan if parts == 1 else of_whole_sequences(plan, parts), shares) / tokens


def of_whole_sequences(plan: Plan, parts: int) -> Plan:
    """The plan of a rank that holds the last of so many parts of every sequence, at the shapes of the whole ones.

    There are as many keys as queries then, and no summary stands for what came before.
    """
    tokens = plan.example["tokens_shape"][1] * parts

    def whole(choice: NodeChoice) -> NodeChoice:
        longer = {axis: tokens for axis in ("t", "s") if axis in choice.shape}
        return replace(
            choice,
            shape={**choice.shape, **longer, **({"m": 0} if "m" in choice.shape else {})},
            document_lengths=tuple(length * parts for length in choice.document_lengths),
        )

    return replace(plan, choices=tuple(whole(choice) for choice in plan.choices))


def operator_flops(plan: Plan, shares: Mapping[int, int] | None = None) -> int:
    """Of the matrix products inside operators, in one micro-batch, forward and backward.

    `shares` says of a layer how many ranks each compute as much as the plan says.
    """
    return sum(
        row.matmul_flops * (1 if shares is None else shares[choice.layer])
        for choice in plan.choices
        if choice.used
        for row in node_rows(choice, choice.chosen)
    )


def ceiling(target: Target, dtype: str) -> float | None:
    """FLOPs a second of matrix products: of the data sheet if one is shipped, else as they were probed."""
    sheets = (load_device(name) for name in shipped_devices())
    known = next((sheet for sheet in sheets if is_same_model(sheet.name, target.device.name)), target.device)
    return known.matmul_flops_per_s.get(dtype)
