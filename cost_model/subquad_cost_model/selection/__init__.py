"""Which option each layer takes, under budgets: plain arrays in, plans out.

`solve` and `k_best` are exact where the losses of layers add up.
"""

from subquad_cost_model.selection.dynamic_programming import knapsack_1d
from subquad_cost_model.selection.knapsack import NotSolvedError, cheapest, k_best, solve
from subquad_cost_model.selection.problem import (
    Budget,
    Count,
    InfeasibleError,
    Problem,
    Selection,
    at_most_in_a_row,
)

__all__ = [
    "Budget",
    "Count",
    "InfeasibleError",
    "NotSolvedError",
    "Problem",
    "Selection",
    "at_most_in_a_row",
    "cheapest",
    "k_best",
    "knapsack_1d",
    "solve",
]
