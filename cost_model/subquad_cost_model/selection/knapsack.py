"""Exact selection: the multiple-choice knapsack as a mixed-integer linear program, solved by HiGHS.

    min sum q_ik x_ik    over x in {0, 1},    subject to
    sum_k x_ik = 1,      sum c^j_ik x_ik + w_j <= B_j,      w_j >= sum_k p^j_ik x_ik

Every row of a budget is divided by its limit, so that seconds and bytes weigh alike. The workspace w_j is a variable of
its own, which makes the maximum over layers exact without a sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array

from subquad_cost_model.selection.problem import SLACK, Array, InfeasibleError, Problem, Selection

OPTIMAL, TIME_LIMIT, INFEASIBLE = 0, 1, 2
"""What `milp` answers as its status."""
MOST_REPAIRS = 50
"""HiGHS meets rows to within 1e-6. A plan that overshoots a budget by that is excluded, and the rest solved again."""
SPREAD = 1e3
"""What the largest difference of losses is scaled to: HiGHS calls a plan optimal within 1e-6 of the objective, which
then is 1e-9 of that difference."""


class NotSolvedError(RuntimeError):
    """The solver ended without a plan, and without a proof that there is none."""


def solve(problem: Problem, *, seconds: float = 60.0) -> Selection:
    """The plan of least loss. It is proven optimal unless the time ran out.

    Raises: InfeasibleError, which holds the cheapest plan; NotSolvedError when the time ran out without any plan.
    """
    return _solve(problem, (), 1, seconds)


def k_best(problem: Problem, count: int, *, distance: int = 1, seconds: float = 60.0) -> tuple[Selection, ...]:
    """Up to `count` plans in order of loss, any two of which differ in `distance` layers or more.

    Each is optimal among the plans that lie that far from all before it: a no-good cut,
    sum_i x_{i, c_i} <= N - distance, excludes the neighbourhood of each.
    Raises: InfeasibleError when there is no plan at all; NotSolvedError.
    """
    if count < 1 or distance < 1:
        raise ValueError(f"count is {count} and distance {distance}; both are 1 or more")
    found: list[Selection] = []
    while len(found) < count:
        try:
            found.append(_solve(problem, [plan.choice for plan in found], distance, seconds))
        except InfeasibleError:
            if not found:
                raise
            break
    return tuple(found)


def cheapest(problem: Problem, *, seconds: float = 60.0) -> Selection | None:
    """The plan that minimises the largest total_j / B_j, share of a budget; None if counts or ties exclude all."""
    program = _Program.of(problem)
    # One more variable r: every budget's row becomes  total_j / B_j <= r.
    rows = csr_array(np.hstack([program.budget_rows.toarray(), -np.ones((len(problem.budgets), 1))]))
    others = _with_empty_column(program.other_rows)
    objective = np.append(np.zeros(program.size), 1.0)
    answer = milp(
        objective,
        integrality=np.append(program.integral, 0),
        bounds=Bounds(np.append(program.low, 0.0), np.append(program.high, np.inf)),
        constraints=[
            LinearConstraint(rows, -np.inf, 0.0),
            LinearConstraint(others, program.other_low, program.other_high),
        ],
        options={"time_limit": seconds, "mip_rel_gap": 0},
    )
    if answer.x is None:
        return None
    return _selection(problem, program.choice(answer.x), optimal=False)


def _solve(problem: Problem, excluded: Sequence[tuple[int, ...]], distance: int, seconds: float) -> Selection:
    program = _Program.of(problem)
    cuts = [(choice, problem.num_layers - distance) for choice in excluded]
    for _ in range(MOST_REPAIRS):
        answer = milp(
            program.objective,
            integrality=program.integral,
            bounds=Bounds(program.low, program.high),
            constraints=program.constraints(cuts),
            options={"time_limit": seconds, "mip_rel_gap": 0},
        )
        if answer.status == INFEASIBLE:
            raise _infeasible(problem, seconds)
        if answer.x is None:
            raise NotSolvedError(f"no plan after {seconds:.0f} s: {answer.message}")
        choice = program.choice(answer.x)
        if problem.is_feasible(choice):
            return _selection(problem, choice, optimal=answer.status == OPTIMAL)
        cuts.append((choice, problem.num_layers - 1))
    raise NotSolvedError(f"{MOST_REPAIRS} plans in a row exceeded a budget by less than the solver's tolerance")


def _infeasible(problem: Problem, seconds: float) -> InfeasibleError:
    least = cheapest(problem, seconds=seconds)
    if least is None:
        return InfeasibleError("the counts and ties exclude every plan, whatever the budgets", None)
    over = ", ".join(
        f"{budget.name} {least.totals[budget.name]:.6g} of {budget.limit:.6g}" for budget in problem.budgets
    )
    return InfeasibleError(f"no plan meets every budget; the cheapest takes {over}", least)


def _selection(problem: Problem, choice: tuple[int, ...], *, optimal: bool) -> Selection:
    return Selection(choice=choice, loss=problem.loss_of(choice), totals=problem.totals(choice), optimal=optimal)


@dataclass(frozen=True, kw_only=True)
class _Program:
    """The arrays that `milp` takes. Variables: x of the options that exist, layer by layer, then one w per peak."""

    places: tuple[tuple[int, int], ...]  # (layer, option) of each x
    objective: Array
    integral: Array
    low: Array
    high: Array
    budget_rows: csr_array
    other_rows: csr_array
    other_low: Array
    other_high: Array
    size: int

    @classmethod
    def of(cls, problem: Problem) -> _Program:
        places = [(int(i), int(k)) for i, k in zip(*np.nonzero(problem.allowed))]
        column = {place: number for number, place in enumerate(places)}
        peaked = [budget for budget in problem.budgets if budget.peak is not None]
        size = len(places) + len(peaked)
        rows = _Rows(size)
        for layer in range(problem.num_layers):
            rows.add([(column[place], 1.0) for place in places if place[0] == layer], 1.0, 1.0)
        for count in problem.counts:
            members = [(column[place], 1.0) for place in places if count.members[place]]
            rows.add(members, float(count.at_least), np.inf if count.at_most is None else float(count.at_most))
        for tie in problem.ties:
            for layer in tie[1:]:
                for option in range(problem.num_options):
                    pair = [((tie[0], option), 1.0), ((layer, option), -1.0)]
                    rows.add([(column[place], sign) for place, sign in pair if place in column], 0.0, 0.0)
        budgets = _Rows(size)
        for budget in problem.budgets:
            entries = [(column[place], float(budget.cost[place]) / budget.limit) for place in places]
            if budget.peak is not None:
                workspace = len(places) + peaked.index(budget)
                entries.append((workspace, 1.0))
                for layer in range(problem.num_layers):
                    own = [
                        (column[place], -float(budget.peak[place]) / budget.limit)
                        for place in places
                        if place[0] == layer
                    ]
                    rows.add([*own, (workspace, 1.0)], 0.0, np.inf)
            budgets.add(entries, -np.inf, 1.0)
        other_rows, other_low, other_high = rows.arrays()
        scaled = _scaled(problem.loss)
        return cls(
            places=tuple(places),
            objective=np.array([scaled[place] for place in places] + [0.0] * len(peaked)),
            integral=np.array([1.0] * len(places) + [0.0] * len(peaked)),
            low=np.zeros(size),
            high=np.array([1.0] * len(places) + [np.inf] * len(peaked)),
            budget_rows=budgets.arrays()[0],
            other_rows=other_rows,
            other_low=other_low,
            other_high=other_high,
            size=size,
        )

    def constraints(self, cuts: Sequence[tuple[tuple[int, ...], int]]) -> list[LinearConstraint]:
        """The budgets, the other rows, and cuts: at most so many of these choices may be kept."""
        made = [LinearConstraint(self.other_rows, self.other_low, self.other_high)]
        if self.budget_rows.shape[0]:
            made.append(LinearConstraint(self.budget_rows, -np.inf, 1.0 + SLACK))
        if cuts:
            rows = _Rows(self.size)
            for choice, most in cuts:
                kept = [(number, 1.0) for number, (layer, option) in enumerate(self.places) if choice[layer] == option]
                rows.add(kept, -np.inf, float(most))
            made.append(LinearConstraint(*rows.arrays()))
        return made

    def choice(self, x: Array) -> tuple[int, ...]:
        """The option of each layer."""
        best: dict[int, tuple[float, int]] = {}
        for (layer, option), value in zip(self.places, x):
            best[layer] = max(best.get(layer, (-1.0, -1)), (float(value), option))
        return tuple(best[layer][1] for layer in sorted(best))


class _Rows:
    """Collects sparse rows with their bounds."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._entries: list[tuple[int, int, float]] = []
        self._bounds: list[tuple[float, float]] = []

    def add(self, entries: Sequence[tuple[int, float]], low: float, high: float) -> None:
        """One row: columns with their coefficients, and its bounds."""
        self._entries += [(len(self._bounds), column, value) for column, value in entries]
        self._bounds.append((low, high))

    def arrays(self) -> tuple[csr_array, Array, Array]:
        """Matrix, lower bounds, upper bounds."""
        rows, columns, values = zip(*self._entries) if self._entries else ((), (), ())
        matrix = coo_array((values, (rows, columns)), shape=(len(self._bounds), self._width), dtype=np.float64)
        bounds = np.array(self._bounds, dtype=np.float64).reshape(-1, 2)
        return csr_array(matrix), bounds[:, 0], bounds[:, 1]


def _scaled(loss: Array) -> Array:
    """The same order of plans: every layer's least loss is 0, and the largest difference `SPREAD`."""
    above = loss - loss.min(axis=1, keepdims=True)
    largest = float(above[np.isfinite(above)].max())
    scaled: Array = above * (SPREAD / largest if largest > 0 else 1.0)
    return scaled


def _with_empty_column(matrix: csr_array) -> csr_array:
    return csr_array((matrix.data, matrix.indices, matrix.indptr), shape=(matrix.shape[0], matrix.shape[1] + 1))
