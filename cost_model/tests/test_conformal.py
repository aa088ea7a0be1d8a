"""Widths that promise nine in ten of new groups keep it; groups that are large do not count more than others."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad_cost_model.conformal import grouped_quantile, worst_quantile


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60), st.sampled_from([0.5, 0.8, 0.9]))
def test_groups_of_one_are_ordinary_split_conformal(scores: list[float], level: float) -> None:
    """The ceil(level (n + 1))-th smallest score, or infinity."""
    rank = math.ceil(level * (len(scores) + 1) - 1e-9)
    expected = sorted(scores)[rank - 1] if rank <= len(scores) else math.inf
    assert grouped_quantile(scores, range(len(scores)), level) == expected


def test_a_group_weighs_the_same_whatever_its_size() -> None:
    small = grouped_quantile([1.0, 2.0, 3.0], "abc", 0.7)
    large = grouped_quantile([1.0] * 100 + [2.0, 3.0], "a" * 100 + "bc", 0.7)
    assert small == large == 3.0


def test_new_groups_are_covered_as_promised() -> None:
    """Rows of a group share most of their error: counted one by one they would cover far too little."""
    draw = np.random.default_rng(0)
    covered, naive_covered = [], []
    for _ in range(400):
        sizes = draw.integers(1, 30, 20)
        groups = np.repeat(np.arange(20), sizes)
        scores = np.abs(draw.normal(size=20)[groups] + 0.1 * draw.normal(size=len(groups)))
        new = abs(draw.normal() + 0.1 * draw.normal())
        covered.append(new <= grouped_quantile(scores, groups.tolist(), 0.9))
        naive_covered.append(new <= np.quantile(scores, 0.9, method="higher"))
    # The mean of 400 draws at 0.9 has a standard deviation of 0.015.
    assert np.mean(covered) > 0.9 - 0.045
    assert np.mean(naive_covered) < np.mean(covered)


def test_few_groups_of_devices_give_the_worst_of_them() -> None:
    scores, groups = [*range(1, 11), *range(101, 111)], ["a"] * 10 + ["b"] * 10
    assert worst_quantile(scores, groups, 0.9) == 110
    assert worst_quantile(scores, groups, 0.5) == 106
    assert worst_quantile(scores[:10], groups[:10], 0.9) == math.inf


def test_too_few_groups_promise_nothing() -> None:
    assert grouped_quantile([1.0] * 8, range(8), 0.9) == math.inf
    assert grouped_quantile([1.0] * 9, range(9), 0.9) == pytest.approx(1.0)
