"""The last steps of a descent: exchanges of one or two layers' options, as long as the joint loss falls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from subquad_cost_model.selection.problem import SLACK, Array, Problem

Objective: TypeAlias = Callable[[Array], tuple[float, Array]]
"""The joint loss and its gradient at distributions p, layers by options; at a one-hot p it is the loss of that plan."""

POOL = 200
"""Single exchanges from which pairs are made: so many of the most promising, and of the most saving per budget."""


def value_of(objective: Objective, problem: Problem, choice: Sequence[int]) -> float:
    """The joint loss of a plan."""
    return objective(one_hot(problem, choice))[0]


def polish(problem: Problem, objective: Objective, choice: tuple[int, ...], *, tries: int = 200) -> tuple[int, ...]:
    """A feasible plan that no promising exchange of one or two layers improves.

    Exchanges are tried in the order that the gradient at the plan promises, `tries` of them at most before giving up;
    where losses add up that order is exact, and the plan is then the best within two exchanges of its pool.
    """
    while True:
        value, gradient = objective(one_hot(problem, choice))
        for rival in _promising(problem, gradient, choice, tries):
            if value_of(objective, problem, rival) < value - 1e-12 * abs(value):
                choice = rival
                break
        else:
            return choice


def _promising(problem: Problem, gradient: Array, choice: tuple[int, ...], tries: int) -> list[tuple[int, ...]]:
    rows = np.arange(problem.num_layers)
    current = np.zeros(problem.loss.shape, dtype=bool)
    current[rows, choice] = True
    layers, options = np.nonzero(problem.allowed & ~current)
    promise = gradient[layers, options] - gradient[rows, choice][layers]
    saving = [
        (budget.cost[layers, options] - budget.cost[rows, choice][layers]) / budget.limit for budget in problem.budgets
    ]
    pool = np.unique(np.concatenate([np.argsort(values, kind="stable")[:POOL] for values in (promise, *saving)]))
    one, other = np.triu_indices(len(pool), k=1)
    one, other = pool[one], pool[other]
    apart = layers[one] != layers[other]
    singles = np.arange(len(layers))
    first = np.concatenate([singles, one[apart]])
    second = np.concatenate([np.full(len(layers), -1), other[apart]])

    def summed(values: Array) -> Array:
        total: Array = values[first] + np.where(second < 0, 0.0, values[second])
        return total

    fits = np.ones(len(first), dtype=bool)
    for budget, change in zip(problem.budgets, saving):
        left = 1 - float(budget.cost[rows, choice].sum()) / budget.limit
        fits &= summed(change) <= left + SLACK
    promised = np.where(fits, summed(promise), np.inf)
    found: list[tuple[int, ...]] = []
    for move in np.argsort(promised, kind="stable"):
        if len(found) == tries or not fits[move]:
            break
        rival = list(choice)
        for exchange in (first[move], second[move]):
            if exchange >= 0:
                rival[layers[exchange]] = int(options[exchange])
        if problem.is_feasible(rival):
            found.append(tuple(rival))
    return found


def one_hot(problem: Problem, choice: Sequence[int]) -> Array:
    """A plan as distributions.  Shapes:  layers  ->  layers options"""
    made = np.zeros(problem.loss.shape)
    made[np.arange(len(choice)), choice] = 1.0
    return made
