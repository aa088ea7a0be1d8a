"""What another second or byte would buy: the plans of least loss along a grid of one budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from subquad_cost_model.selection.knapsack import cheapest, solve
from subquad_cost_model.selection.problem import InfeasibleError, Problem, Selection


def pareto_front(problem: Problem, name: str, *, points: int = 20, seconds: float = 60.0) -> tuple[Selection, ...]:
    """Plans none of which another beats in both loss and the budget `name`, the cheapest first.

    The budget's limit runs in equal ratios from the least that any plan takes to what the best plan takes without it;
    the problem's other budgets hold throughout, and its own limit for this one is ignored.
    Raises: KeyError when there is no such budget; InfeasibleError when the others exclude every plan.
    """
    others = tuple(budget for budget in problem.budgets if budget.name != name)
    swept = {budget.name: budget for budget in problem.budgets}[name]
    best = solve(replace(problem, budgets=others), seconds=seconds)
    least = cheapest(replace(problem, budgets=(swept,)), seconds=seconds)
    low, high = swept.total(least.choice) if least else 0.0, swept.total(best.choice)
    found = [replace(best, totals=problem.totals(best.choice))]
    for limit in np.geomspace(max(low, high * 1e-6), high, points) if high > 0 else ():
        try:
            found.append(solve(replace(problem, budgets=(replace(swept, limit=limit), *others)), seconds=seconds))
        except InfeasibleError:
            continue  # the other budgets exclude it
    return non_dominated(found, name)


def non_dominated(plans: list[Selection], name: str) -> tuple[Selection, ...]:
    """Those plans that no other beats in both loss and the total of `name`, ordered by that total."""
    front: list[Selection] = []
    for plan in sorted(plans, key=lambda plan: (plan.totals[name], plan.loss)):
        if not front or plan.loss < front[-1].loss:
            front.append(plan)
    return tuple(front)
