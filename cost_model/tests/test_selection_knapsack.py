"""The exact solver against brute force and against dynamic programming, and what it says where there is no plan."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from subquad_cost_model.selection import (
    Budget,
    Count,
    InfeasibleError,
    Problem,
    at_most_in_a_row,
    cheapest,
    k_best,
    knapsack_1d,
    solve,
)

Array = NDArray[np.float64]


def every_plan(problem: Problem) -> Iterator[tuple[int, ...]]:
    """All feasible plans, by looking at each."""
    for choice in itertools.product(range(problem.num_options), repeat=problem.num_layers):
        if problem.is_feasible(choice):
            yield choice


def drawn(rng: np.random.Generator, layers: int, options: int, budgets: int, share: float) -> Problem:
    """Losses and costs that trade off, on scales nine orders apart; some options are missing."""
    loss = rng.exponential(size=(layers, options)) * 10.0 ** rng.integers(-6, 3)
    loss[rng.random((layers, options)) < 0.15] = np.inf
    loss[np.arange(layers), rng.integers(options, size=layers)] = rng.exponential(size=layers)
    made = []
    for number in range(budgets):
        cost = rng.exponential(size=(layers, options)) * (1e-3, 1e9)[number % 2]
        low, mean = cost.min(axis=1).sum(), cost.mean(axis=1).sum()
        peak = rng.exponential(size=(layers, options)) * cost.mean() if number == 1 else None
        made.append(Budget(name=f"budget {number}", cost=cost, limit=low + share * (mean - low), peak=peak))
    return Problem(loss=loss, budgets=tuple(made))


@pytest.mark.parametrize("seed", range(24))
def test_the_plan_is_that_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng([seed, 1])
    problem = drawn(rng, layers=5, options=4, budgets=1 + seed % 3, share=0.4 + 0.6 * rng.random())
    feasible = list(every_plan(problem))
    if not feasible:
        with pytest.raises(InfeasibleError):
            solve(problem)
        return
    plan = solve(problem)
    assert plan.optimal
    assert problem.is_feasible(plan.choice)
    assert plan.loss == pytest.approx(min(problem.loss_of(choice) for choice in feasible), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_plan_is_that_of_dynamic_programming_under_one_budget_of_whole_units(seed: int) -> None:
    rng = np.random.default_rng([seed, 2])
    loss, cost = rng.exponential(size=(12, 6)), rng.integers(0, 40, size=(12, 6)).astype(np.float64)
    limit = int(cost.min(axis=1).sum()) + int(rng.integers(20, 120))
    problem = Problem(loss=loss, budgets=(Budget(name="time", cost=cost, limit=limit),))
    choice = knapsack_1d(loss, cost, limit, units=limit)
    assert choice is not None and problem.is_feasible(choice)
    assert solve(problem).loss == pytest.approx(problem.loss_of(choice), rel=1e-9)


def test_dynamic_programming_never_exceeds_the_budget_and_says_when_it_cannot() -> None:
    rng = np.random.default_rng(3)
    loss, cost = rng.exponential(size=(9, 5)), rng.random((9, 5))
    limit = 1.3 * cost.min(axis=1).sum()
    choice = knapsack_1d(loss, cost, limit, units=500)
    assert choice is not None and cost[np.arange(9), choice].sum() <= limit * (1 + 1e-9)
    assert knapsack_1d(loss, cost, 0.9 * cost.min(axis=1).sum()) is None


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_the_k_best_are_the_first_of_all_plans_that_far_apart(distance: int) -> None:
    problem = drawn(np.random.default_rng(40 + distance), layers=4, options=4, budgets=2, share=2.5)
    left = sorted(every_plan(problem), key=problem.loss_of)
    assert len(left) >= 10
    expected: list[float] = []
    while left and len(expected) < 5:
        best = left[0]
        expected.append(problem.loss_of(best))
        left = [plan for plan in left if sum(a != b for a, b in zip(plan, best)) >= distance]
    plans = k_best(problem, 5, distance=distance)
    assert [plan.loss for plan in plans] == pytest.approx(expected, rel=1e-9)
    assert all(plan.optimal for plan in plans)
    for one, other in itertools.combinations(plans, 2):
        assert sum(a != b for a, b in zip(one.choice, other.choice)) >= distance


def test_k_best_ends_where_the_plans_end() -> None:
    problem = Problem(loss=np.array([[0.0, 1.0], [0.0, 3.0]]))
    assert [plan.choice for plan in k_best(problem, 9)] == [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize("seed", range(6))
def test_counts_and_ties_hold_and_cost_no_more_than_they_must(seed: int) -> None:
    rng = np.random.default_rng([seed, 5])
    loss = rng.exponential(size=(5, 3))
    linear = np.zeros((5, 3), dtype=bool)
    linear[:, 1:] = True
    problem = Problem(
        loss=loss,
        budgets=(Budget(name="time", cost=rng.random((5, 3)), limit=3.0),),
        counts=(
            Count(name="attention", members=~linear, at_least=1, at_most=2),
            *at_most_in_a_row("linear in a row", linear, 2),
        ),
        ties=((0, 3),),
    )
    plan = solve(problem)
    attention = [option == 0 for option in plan.choice]
    assert 1 <= sum(attention) <= 2
    assert plan.choice[0] == plan.choice[3]
    assert all(any(attention[first : first + 3]) for first in range(3))
    assert plan.loss == pytest.approx(min(problem.loss_of(choice) for choice in every_plan(problem)), rel=1e-9)


def test_an_infeasible_budget_names_the_cheapest_plan_and_what_it_takes() -> None:
    rng = np.random.default_rng(6)
    problem = drawn(rng, layers=4, options=3, budgets=2, share=1.0)
    tight = Problem(
        loss=problem.loss,
        budgets=tuple(
            Budget(name=budget.name, cost=budget.cost, limit=budget.limit / 50, peak=budget.peak)
            for budget in problem.budgets
        ),
    )
    with pytest.raises(InfeasibleError, match="the cheapest takes budget 0") as caught:
        solve(tight)
    least = caught.value.cheapest
    assert least is not None

    def largest_share(choice: tuple[int, ...]) -> float:
        return max(budget.total(choice) / budget.limit for budget in tight.budgets)

    allowed = [
        choice
        for choice in itertools.product(range(3), repeat=4)
        if tight.allowed[np.arange(4), choice].all()
    ]  # fmt: skip
    assert largest_share(least.choice) == pytest.approx(min(map(largest_share, allowed)), rel=1e-6)
    assert least.totals == {budget.name: budget.total(least.choice) for budget in tight.budgets}


def test_counts_that_exclude_every_plan_are_told_from_budgets() -> None:
    members = np.ones((3, 2), dtype=bool)
    problem = Problem(loss=np.zeros((3, 2)), counts=(Count(name="none", members=members, at_most=2),))
    with pytest.raises(InfeasibleError, match="counts and ties exclude every plan") as caught:
        solve(problem)
    assert caught.value.cheapest is None
    assert cheapest(problem) is None


def test_a_budget_met_to_the_last_digit_is_met() -> None:
    cost = np.full((7, 2), 0.1)
    cost[:, 1] = 0.2
    problem = Problem(
        loss=np.tile([1.0, 0.0], (7, 1)), budgets=(Budget(name="time", cost=cost, limit=0.7),)
    )  # seven times 0.1 is 0.7000000000000001 in float64
    assert solve(problem).choice == (0,) * 7


def test_a_loss_of_one_millionth_still_decides() -> None:
    loss = np.zeros((30, 2))
    loss[:, 1] = np.random.default_rng(7).random(30) * 1e-9
    cost = np.tile([1.0, 0.0], (30, 1))
    plan = solve(Problem(loss=loss, budgets=(Budget(name="count", cost=cost, limit=15.0),)))
    assert plan.loss == pytest.approx(np.sort(loss[:, 1])[:15].sum(), rel=1e-9)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"loss": np.array([[np.inf, np.inf], [0.0, 1.0]])}, "layer 0 has no option"),
        ({"loss": np.array([[np.nan, 0.0]])}, "NaN"),
        ({"loss": np.zeros(3)}, "shape"),
        ({"loss": np.zeros((2, 2)), "budgets": (Budget(name="b", cost=np.ones((2, 2)), limit=0.0),)}, "positive"),
        ({"loss": np.zeros((2, 2)), "budgets": (Budget(name="b", cost=-np.ones((2, 2)), limit=1.0),)}, "negative"),
        ({"loss": np.zeros((2, 2)), "budgets": (Budget(name="b", cost=np.ones((2, 3)), limit=1.0),)}, "shape"),
        ({"loss": np.zeros((2, 2)), "ties": ((0, 2),)}, "outside"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(given: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Problem(**given)  # type: ignore[arg-type]


@pytest.mark.slow
def test_eighty_layers_of_54_options_under_two_budgets_are_solved_to_optimality() -> None:
    from time import perf_counter

    rng = np.random.default_rng(8)
    strength = rng.random((80, 54))
    budgets = tuple(
        Budget(name=name, cost=cost, limit=float(cost.mean(axis=1).sum() * 0.6))
        for name, cost in (
            ("latency", strength + 0.3 * rng.random((80, 54))),
            ("memory", 1e9 * (0.5 * strength + 0.5 * rng.random((80, 54)))),
        )
    )
    problem = Problem(loss=(1 - strength) ** 2 * rng.exponential(size=(80, 1)), budgets=budgets)
    started = perf_counter()
    plan = solve(problem)
    print(f"80 x 54, 2 budgets: {perf_counter() - started:.2f} s")
    assert plan.optimal and problem.is_feasible(plan.choice)
