"""The selection problem as plain arrays: which option each layer takes, under budgets and side conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

SLACK = 1e-9
"""How far, relative to its budget, a total may exceed it: the rounding of a sum of float64."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """sum_i cost[i, choice_i] + max_i peak[i, choice_i] <= limit.

    Shapes:  cost, peak: layers options (>= 0; `peak` may be left out)
    `peak` is what a layer needs only while it runs, such as the workspace of its kernels.
    """

    name: str
    cost: Array
    limit: float
    peak: Array | None = None

    def total(self, choice: Sequence[int]) -> float:
        """What a plan uses of this budget."""
        rows = np.arange(len(choice))
        highest = 0.0 if self.peak is None else float(self.peak[rows, choice].max())
        return float(self.cost[rows, choice].sum()) + highest


@dataclass(frozen=True, kw_only=True)
class Count:
    """at_least <= (how many layers choose an option of `members`) <= at_most.  Shapes:  members: layers options"""

    name: str
    members: Mask
    at_least: int = 0
    at_most: int | None = None

    def holds(self, choice: Sequence[int]) -> bool:
        """Whether a plan meets it."""
        chosen = int(self.members[np.arange(len(choice)), choice].sum())
        return self.at_least <= chosen and (self.at_most is None or chosen <= self.at_most)


def at_most_in_a_row(name: str, members: Mask, longest: int) -> tuple[Count, ...]:
    """Counts which say that no more than `longest` consecutive layers choose an option of `members`."""
    windows = []
    for first in range(len(members) - longest):
        inside = np.zeros_like(members)
        inside[first : first + longest + 1] = members[first : first + longest + 1]
        windows.append(Count(name=f"{name}, layers {first} to {first + longest}", members=inside, at_most=longest))
    return tuple(windows)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """min sum_i loss[i, choice_i]  over plans that meet every budget, every count and every tie.

    Shapes:  loss: layers options; inf where a layer has no such option, else finite
    `ties` are groups of layers that must choose alike. Raises: ValueError for arrays that do not fit together.
    """

    loss: Array
    budgets: tuple[Budget, ...] = ()
    counts: tuple[Count, ...] = ()
    ties: tuple[tuple[int, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        if self.loss.ndim != 2 or not self.loss.size:
            raise ValueError(f"loss has the shape {self.loss.shape}, not (layers, options)")
        if np.isnan(self.loss).any() or np.isneginf(self.loss).any():
            raise ValueError("loss holds NaN or minus infinity")
        if not self.allowed.any(axis=1).all():
            raise ValueError(f"layer {int(self.allowed.any(axis=1).argmin())} has no option")
        for budget in self.budgets:
            if not budget.limit > 0 or not np.isfinite(budget.limit):
                raise ValueError(f"the budget '{budget.name}' is {budget.limit}; it must be positive and finite")
            for what in (budget.cost, budget.peak):
                if what is not None and what.shape != self.loss.shape:
                    raise ValueError(f"'{budget.name}' has the shape {what.shape}, loss has {self.loss.shape}")
                if what is not None and not (np.isfinite(what[self.allowed]) & (what[self.allowed] >= 0)).all():
                    raise ValueError(f"a cost of '{budget.name}' is negative or not finite")
        for count in self.counts:
            if count.members.shape != self.loss.shape:
                raise ValueError(f"'{count.name}' has the shape {count.members.shape}, loss has {self.loss.shape}")
        for tie in self.ties:
            if not set(tie) <= set(range(self.num_layers)):
                raise ValueError(f"the tie {tie} names a layer outside 0 to {self.num_layers - 1}")

    @property
    def num_layers(self) -> int:
        """How many choices a plan makes."""
        return int(self.loss.shape[0])

    @property
    def num_options(self) -> int:
        """The most options that a layer has."""
        return int(self.loss.shape[1])

    @property
    def allowed(self) -> Mask:
        """Which options exist.  Shapes:  layers options"""
        return np.isfinite(self.loss)

    def loss_of(self, choice: Sequence[int]) -> float:
        """The additive loss of a plan."""
        return float(self.loss[np.arange(len(choice)), choice].sum())

    def totals(self, choice: Sequence[int]) -> Mapping[str, float]:
        """What a plan uses of each budget."""
        return {budget.name: budget.total(choice) for budget in self.budgets}

    def is_feasible(self, choice: Sequence[int]) -> bool:
        """Whether a plan exists and meets every budget, count and tie."""
        return (
            bool(self.allowed[np.arange(len(choice)), choice].all())
            and all(budget.total(choice) <= budget.limit * (1 + SLACK) for budget in self.budgets)
            and all(count.holds(choice) for count in self.counts)
            and all(len({choice[layer] for layer in tie}) <= 1 for tie in self.ties)
        )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A plan: the option of each layer, its loss, and what it uses of each budget.

    `optimal`: no other plan has a smaller additive loss, and that is proven.
    """

    choice: tuple[int, ...]
    loss: float
    totals: Mapping[str, float]
    optimal: bool


class InfeasibleError(ValueError):
    """No plan meets every budget.

    `cheapest` is the plan whose largest share of a budget is smallest; None if the counts and ties alone exclude
    every plan.
    """

    def __init__(self, message: str, cheapest: Selection | None) -> None:
        super().__init__(message)
        self.cheapest = cheapest
