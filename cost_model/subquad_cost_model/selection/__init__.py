"""Which option each layer takes, under budgets: plain arrays in, plans out.

`solve` and `k_best` are exact where the losses of layers add up, `pareto_front` asks them along a grid of one budget.
Where layers interact, `choose_jointly` (RCO) and `choose_by_penalty` (LinVideo, a baseline) follow the joint loss.
"""

from subquad_cost_model.selection.dynamic_programming import knapsack_1d
from subquad_cost_model.selection.knapsack import NotSolvedError, cheapest, k_best, solve
from subquad_cost_model.selection.linvideo import GatedSelection, choose_by_penalty
from subquad_cost_model.selection.pareto import non_dominated, pareto_front
from subquad_cost_model.selection.polish import Objective, polish
from subquad_cost_model.selection.problem import (
    Budget,
    Count,
    InfeasibleError,
    Problem,
    Selection,
    at_most_in_a_row,
)
from subquad_cost_model.selection.rco import JointSelection, Settings, choose_jointly

__all__ = [
    "Budget",
    "Count",
    "GatedSelection",
    "InfeasibleError",
    "JointSelection",
    "NotSolvedError",
    "Objective",
    "Problem",
    "Selection",
    "Settings",
    "at_most_in_a_row",
    "cheapest",
    "choose_by_penalty",
    "choose_jointly",
    "k_best",
    "knapsack_1d",
    "non_dominated",
    "pareto_front",
    "polish",
    "solve",
]
