"""A baseline for two options and a count: gates that a penalty pushes towards 0 or 1 (LinVideo's selective transfer).

Layer i runs  r_i attention + (1 - r_i) linear.  With n layers to convert,

    min  L(r) + weight [ (sum_i round(1 - r_i) - n)^2 + sum_i (1 - |2 r_i - 1|^alpha) ],     r in [0, 1]

The rounding passes gradients straight through; alpha falls from large to small, so that gates are decided late.
Source: LinVideo 2025, section on selective transfer (formulas as quoted by secondary sources). The count is a penalty
here: it can be missed, which `rco.py` cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from subquad_cost_model.selection.polish import Objective
from subquad_cost_model.selection.problem import Array


@dataclass(frozen=True, kw_only=True)
class GatedSelection:
    """Option 0 is kept, option 1 is converted; `converted` may differ from the number that was asked for."""

    choice: tuple[int, ...]
    value: float
    converted: int
    gates: tuple[float, ...]


def choose_by_penalty(
    objective: Objective,
    layers: int,
    convert: int,
    *,
    weight: float = 1.0,
    steps: int = 1000,
    learning_rate: float = 0.02,
    first_alpha: float = 20.0,
    last_alpha: float = 2.0,
) -> GatedSelection:
    """Convert about `convert` of the layers, by Adam on their gates from r = 1 on.

    `objective` takes distributions over (attention, linear); `weight` is in units of its loss.
    """
    if not 0 <= convert <= layers:
        raise ValueError(f"{convert} of {layers} layers cannot be converted")
    gates = np.ones(layers)
    first, second = np.zeros(layers), np.zeros(layers)
    for step in range(1, steps + 1):
        alpha = first_alpha * (last_alpha / first_alpha) ** ((step - 1) / max(steps - 1, 1))
        _, gradient = objective(_distributions(gates))
        over = np.round(1 - gates).sum() - convert
        sides = 2 * gates - 1
        decided = -2 * alpha * np.sign(sides) * np.abs(sides) ** (alpha - 1)
        slope = gradient[:, 0] - gradient[:, 1] + weight * (-2 * over + decided)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        unbiased = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        gates = np.clip(gates - learning_rate * (first / (1 - 0.9**step)) / unbiased, 0.0, 1.0)
    choice = tuple(int(gate < 0.5) for gate in gates)
    value, _ = objective(np.eye(2)[list(choice)])
    return GatedSelection(choice=choice, value=value, converted=sum(choice), gates=tuple(map(float, gates)))


def _distributions(gates: Array) -> Array:
    return np.stack([gates, 1 - gates], axis=1)
