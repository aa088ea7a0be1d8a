"""Descent on the budgets' surface: its parts against their definitions, its plans against exact solutions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linprog, minimize
from scipy.special import softmax

from subquad_cost_model.selection import (
    Budget,
    Count,
    InfeasibleError,
    Problem,
    Settings,
    choose_by_penalty,
    choose_jointly,
    solve,
)
from subquad_cost_model.selection.polish import Objective, one_hot, polish, value_of
from subquad_cost_model.selection.rco import (
    active_normals,
    descend,
    expected_totals,
    initial_logits,
    retract,
    steepest,
    surface,
    through_softmax,
    within,
)

Array = NDArray[np.float64]


def trade_off(rng: np.random.Generator, layers: int, options: int, budgets: int, share: float = 0.5) -> Problem:
    """Stronger options lose less and cost more, in every budget in its own way."""
    strength = np.sort(rng.random((layers, options)), axis=1)
    loss = (1 - strength) ** 2 * rng.exponential(size=(layers, 1))
    made = []
    for number in range(budgets):
        cost = (0.6 * strength + 0.4 * rng.random((layers, options))) * (1e-3, 1e9, 1.0)[number]
        low, high = cost.min(axis=1).sum(), cost.max(axis=1).sum()
        made.append(Budget(name=f"budget {number}", cost=cost, limit=low + share * (high - low)))
    return Problem(loss=loss, budgets=tuple(made))


def additive(problem: Problem) -> Objective:
    """The loss that adds up over layers."""
    finite = np.where(problem.allowed, problem.loss, 0.0)
    return lambda p: (float((finite * p).sum()), finite)


def quadratic(linear: Array, joint: Array) -> Objective:
    """<q, p> + p^T J p, J symmetric without terms inside a layer."""

    def value(p: Array) -> tuple[float, Array]:
        reached = np.einsum("ikjl,jl->ik", joint, p)
        return float((linear * p).sum() + (p * reached).sum()), linear + 2 * reached

    return value


@pytest.mark.parametrize("seed", range(20))
def test_a_retraction_meets_every_budget_that_was_exceeded_to_ten_digits(seed: int) -> None:
    rng = np.random.default_rng([seed, 11])
    problem = trade_off(rng, layers=12, options=5, budgets=1 + seed % 3, share=0.1 + 0.6 * rng.random())
    costs = surface(problem)
    logits = 4 * rng.normal(size=problem.loss.shape) + 6 * costs[0] * problem.num_layers
    before, moved = expected_totals(logits, costs), retract(logits, costs)
    after = expected_totals(moved, costs)
    assert (after <= 1 + 1e-10).all()
    if (before > 1).any():
        assert np.abs(after - 1).min() <= 1e-10
    else:
        assert (moved == logits).all()


@pytest.mark.parametrize("seed", range(8))
def test_a_retraction_is_the_minimum_of_its_convex_function_over_shifts_that_are_not_positive(seed: int) -> None:
    rng = np.random.default_rng([seed, 12])
    problem = trade_off(rng, layers=8, options=4, budgets=2, share=0.3)
    costs, logits = surface(problem), 3 * rng.normal(size=problem.loss.shape)

    def potential(s: Array) -> float:
        return float(np.log(np.exp(logits + np.tensordot(s, costs, 1)).sum(axis=1)).sum() - s.sum())

    found = minimize(potential, np.zeros(2), bounds=[(None, 0.0)] * 2, method="L-BFGS-B", options={"ftol": 1e-15})
    expected = softmax(logits + np.tensordot(found.x, costs, 1), axis=1)
    np.testing.assert_allclose(softmax(retract(logits, costs), axis=1), expected, atol=2e-5)


def test_budgets_below_every_plan_are_refused_by_the_retraction() -> None:
    problem = trade_off(np.random.default_rng(13), layers=5, options=3, budgets=2, share=-0.2)
    with pytest.raises(ValueError, match="no distribution"):
        retract(np.zeros((5, 3)), surface(problem))
    with pytest.raises(InfeasibleError):
        choose_jointly(problem, additive(problem))


@pytest.mark.parametrize("seed", range(12))
def test_what_is_left_of_a_gradient_descends_and_leaves_no_active_budget(seed: int) -> None:
    rng = np.random.default_rng([seed, 14])
    normals = rng.normal(size=(3, 4, 3)) + 2 * rng.normal(size=(4, 3))  # correlated
    gradient = rng.normal(size=(4, 3))
    left = within(gradient, normals)
    flat = normals.reshape(3, -1)
    assert (flat @ -left.ravel() <= 1e-9).all()
    assert (gradient * left).sum() >= -1e-12
    # The nearest such vector, by a general solver on the dual.
    dual = minimize(
        lambda rate: float(((gradient.ravel() + rate @ flat) ** 2).sum()), np.zeros(3), bounds=[(0, None)] * 3,
        options={"ftol": 1e-15},
    )  # fmt: skip
    assert (left**2).sum() == pytest.approx(float(dual.fun), rel=1e-5, abs=1e-7)


def test_normals_and_the_gradient_through_the_softmax_are_derivatives() -> None:
    rng = np.random.default_rng(15)
    problem = trade_off(rng, layers=4, options=3, budgets=2, share=0.3)
    costs = surface(problem)
    logits = retract(3 * rng.normal(size=(4, 3)) + 20 * costs.sum(axis=0), costs)
    weights = rng.normal(size=(4, 3))
    got = through_softmax(weights, softmax(logits, axis=1))
    used = expected_totals(logits, costs) >= 1 - 1e-6
    normals = active_normals(logits, costs)
    assert used.any() and len(normals) == used.sum()
    for place in itertools.product(range(4), range(3)):
        bump = np.zeros((4, 3))
        bump[place] = 1e-6

        def slope(of: Array, bump: Array = bump) -> float:
            up, down = (softmax(logits + sign * bump, axis=1) for sign in (1, -1))
            return float((of * (up - down)).sum() / 2e-6)

        assert got[place] == pytest.approx(slope(weights), abs=1e-7)
        for normal, cost in zip(normals, costs[used]):
            assert normal[place] == pytest.approx(slope(cost), abs=1e-7)


@pytest.mark.parametrize("budgets", [1, 2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_where_losses_add_up_descent_comes_close_to_the_exact_plan(seed: int, budgets: int) -> None:
    problem = trade_off(np.random.default_rng([seed, budgets, 16]), layers=24, options=6, budgets=budgets)
    objective, exact = additive(problem), solve(problem)
    p = descend(problem, objective, initial_logits(problem), Settings())
    plan = steepest(problem, objective(p)[1])
    assert problem.is_feasible(plan)
    assert problem.loss_of(plan) <= 1.025 * exact.loss
    polished = polish(problem, objective, plan)
    assert problem.is_feasible(polished)
    assert problem.loss_of(polished) <= 1.005 * exact.loss


@pytest.mark.parametrize("budgets", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_relaxed_loss_approaches_that_of_the_linear_program(seed: int, budgets: int) -> None:
    problem = trade_off(np.random.default_rng([seed, budgets, 17]), layers=24, options=6, budgets=budgets)
    p = descend(problem, additive(problem), initial_logits(problem), Settings())
    costs, layers = surface(problem), np.kron(np.eye(24), np.ones(6))
    relaxed = linprog(
        problem.loss.ravel(),
        A_ub=costs.reshape(budgets, -1),
        b_ub=np.ones(budgets),
        A_eq=layers,
        b_eq=np.ones(24),
        bounds=(0, 1),
    )
    assert (np.einsum("jik,ik->j", costs, p) <= 1 + 1e-9).all()
    assert relaxed.fun <= (problem.loss * p).sum() * (1 + 1e-9)
    assert (problem.loss * p).sum() <= 1.025 * relaxed.fun


@pytest.mark.parametrize("samples", [0, 4])
@pytest.mark.parametrize("seed", range(4))
def test_layers_that_stand_in_for_each_other_mislead_additive_selection_and_not_descent(
    seed: int, samples: int
) -> None:
    """Replacing either layer of a pair is nearly free, replacing both is not; each unpaired layer costs a little."""
    rng = np.random.default_rng([seed, 18])
    layers, pairs = 8, ((0, 1), (2, 3))
    linear = np.zeros((layers, 2))
    linear[:4, 1] = 0.01 * rng.random(4)
    linear[4:, 1] = 0.1 + 0.05 * rng.random(4)
    joint = np.zeros((layers, 2, layers, 2))
    for i, j in pairs:
        joint[i, 1, j, 1] = joint[j, 1, i, 1] = 0.5
    cost = np.tile([1.0, 0.0], (layers, 1))
    problem = Problem(loss=linear, budgets=(Budget(name="attention", cost=cost, limit=4.0),))
    objective = quadratic(linear, joint)
    feasible = [plan for plan in itertools.product(range(2), repeat=layers) if problem.is_feasible(plan)]
    best = min(value_of(objective, problem, plan) for plan in feasible)
    found = choose_jointly(problem, objective, Settings(samples=samples, polishing=False, seed=seed))
    assert found.additive_value > best + 0.5
    assert problem.is_feasible(found.choice)
    assert all(found.choice[i] + found.choice[j] < 2 for i, j in pairs)
    # A few drawn plans cannot tell the layers of one pair apart: they differ by 0.01 at most.
    assert found.value <= best + (0.01 if samples else 1e-9)


def test_counts_shape_the_surface_and_hold_after_rounding() -> None:
    problem = trade_off(np.random.default_rng(19), layers=10, options=3, budgets=1, share=0.9)
    members = np.zeros((10, 3), dtype=bool)
    members[:, 2] = True
    counted = Problem(
        loss=problem.loss,
        budgets=problem.budgets,
        counts=(Count(name="strong", members=members, at_least=2, at_most=3),),
    )
    found = choose_jointly(counted, additive(counted), Settings(steps=200))
    assert 2 <= sum(option == 2 for option in found.choice) <= 3
    assert found.value <= 1.005 * solve(counted).loss


def test_a_missing_option_is_never_chosen() -> None:
    rng = np.random.default_rng(20)
    problem = trade_off(rng, layers=9, options=4, budgets=2)
    loss = problem.loss.copy()
    loss[rng.random((9, 4)) < 0.3] = np.inf
    loss[:, 0] = problem.loss[:, 0]
    holed = Problem(loss=loss, budgets=problem.budgets)
    found = choose_jointly(holed, additive(holed), Settings(steps=120))
    assert holed.is_feasible(found.choice)
    assert found.value <= 1.005 * solve(holed).loss


@pytest.mark.parametrize("seed", range(4))
def test_polishing_ends_where_no_single_or_double_exchange_helps(seed: int) -> None:
    rng = np.random.default_rng([seed, 21])
    problem = trade_off(rng, layers=6, options=3, budgets=2)
    joint = 0.02 * rng.normal(size=(6, 3, 6, 3))
    joint += joint.transpose(2, 3, 0, 1)
    joint[np.arange(6), :, np.arange(6), :] = 0
    objective = quadratic(problem.loss, joint)
    plan = polish(problem, objective, solve(problem).choice, tries=10_000)
    reached = value_of(objective, problem, plan)
    for rival in itertools.product(range(3), repeat=6):
        if problem.is_feasible(rival) and sum(a != b for a, b in zip(plan, rival)) <= 2:
            assert value_of(objective, problem, rival) >= reached - 1e-9
    assert one_hot(problem, plan).sum() == 6


@pytest.mark.parametrize("seed", range(4))
def test_penalised_gates_convert_the_layers_that_lose_least(seed: int) -> None:
    rng = np.random.default_rng([seed, 22])
    loss = np.stack([np.zeros(10), rng.permutation(np.linspace(0.1, 1.0, 10))], axis=1)
    found = choose_by_penalty(lambda p: (float((loss * p).sum()), loss), 10, 4)
    assert found.converted == sum(found.choice)
    assert abs(found.converted - 4) <= 1  # the count is a penalty, not a condition
    kept = [loss[i, 1] for i in range(10) if not found.choice[i]]
    converted = [loss[i, 1] for i in range(10) if found.choice[i]]
    assert max(converted) < min(kept)
