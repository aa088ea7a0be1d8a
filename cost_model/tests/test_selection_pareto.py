"""The front along one budget against all plans."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from subquad_cost_model.selection import Budget, InfeasibleError, Problem, pareto_front


def small(seed: int, other_share: float = 0.7) -> Problem:
    rng = np.random.default_rng([seed, 31])
    costs = rng.random((5, 3)), 1e9 * rng.random((5, 3))
    low, high = costs[1].min(axis=1).sum(), costs[1].max(axis=1).sum()
    return Problem(
        loss=rng.exponential(size=(5, 3)),
        budgets=(
            Budget(name="latency", cost=costs[0], limit=1e-3),  # ignored along the front
            Budget(
                name="memory", cost=costs[1], limit=low + other_share * (high - low) if other_share > 0 else low / 2
            ),
        ),
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_plan_of_the_front_is_on_the_true_front_and_its_ends_are_there(seed: int) -> None:
    problem = small(seed)
    latency, memory = problem.budgets
    plans = [
        (latency.total(choice), problem.loss_of(choice))
        for choice in itertools.product(range(3), repeat=5)
        if memory.total(choice) <= memory.limit
    ]
    front = pareto_front(problem, "latency", points=30)
    for plan in front:
        assert memory.total(plan.choice) <= memory.limit
        assert not any(time <= plan.totals["latency"] and loss < plan.loss - 1e-9 for time, loss in plans)
    times = [plan.totals["latency"] for plan in front]
    losses = [plan.loss for plan in front]
    assert times == sorted(times) and losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(min(loss for _, loss in plans))
    assert len(front) >= 3


def test_other_budgets_that_exclude_every_plan_are_said() -> None:
    with pytest.raises(InfeasibleError, match="memory"):
        pareto_front(small(6, other_share=0), "latency")


def test_a_budget_that_is_not_there_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="energy"):
        pareto_front(small(7), "energy")
