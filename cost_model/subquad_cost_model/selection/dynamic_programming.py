"""The multiple-choice knapsack under one budget, by dynamic programming over the budget in whole units.

    best[u] = min over k of  best_before[u - units_k] + loss_k,   units_k = ceil(cost_k / unit)

Rounded up, so that a plan found is within its budget; exact where costs are whole multiples of the unit.
"""

from __future__ import annotations

import numpy as np

from subquad_cost_model.selection.problem import SLACK, Array


def knapsack_1d(loss: Array, cost: Array, limit: float, *, units: int = 10_000) -> tuple[int, ...] | None:
    """The plan of least loss within one budget, discretised into `units`; None if there is none.

    Shapes:  loss, cost: layers options  ->  layers
    Time grows with layers x options x units; the loop over units is numpy's.
    """
    steps = np.ceil(cost / (limit / units) * (1 - SLACK)).astype(np.int64)
    best = np.zeros(units + 1)  # best[u]: the least loss of the layers so far with u units at hand
    taken = np.zeros((len(loss), units + 1), dtype=np.int64)
    for layer, (losses, widths) in enumerate(zip(loss, steps)):
        rivals = np.full((len(losses), units + 1), np.inf)
        for option, (value, width) in enumerate(zip(losses, widths)):
            if np.isfinite(value) and width <= units:
                rivals[option, width:] = best[: units + 1 - width] + value
        taken[layer] = rivals.argmin(axis=0)
        best = rivals.min(axis=0)
    if not np.isfinite(best[units]):
        return None
    left, choice = units, []
    for layer in reversed(range(len(loss))):
        option = int(taken[layer, left])
        choice.append(option)
        left -= int(steps[layer, option])
    return tuple(reversed(choice))
