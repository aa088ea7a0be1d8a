"""Metrics against their definitions, computed the long way."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad_cost_model import Estimate, coverage, error_factor, regret
from subquad_cost_model.metrics import Summary, interval_factor, random_regret, relative_errors

seconds = st.floats(1e-6, 1e3)
pairs = st.lists(st.tuples(seconds, seconds), min_size=1, max_size=20)


@given(st.dictionaries(st.sampled_from("abcdef"), seconds, min_size=1))
def test_regret_is_what_the_choice_lost_against_the_best(measured_s: dict[str, float]) -> None:
    regrets = {name: regret(name, measured_s) for name in measured_s}
    best_s = sorted(measured_s.values())[0]
    for name, lost in regrets.items():
        assert (1 + lost) * best_s == pytest.approx(measured_s[name])
    assert min(regrets.values()) == 0


def test_regret_of_an_unmeasured_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="'new' was not measured; measured: old"):
        regret("new", {"old": 1.0})


@given(pairs)
def test_error_factor_is_the_geometric_mean_of_the_ratios_taken_above_one(values: list[tuple[float, float]]) -> None:
    product = 1.0
    for predicted, measured in values:
        product *= max(predicted / measured, measured / predicted) ** (1 / len(values))
    predicted_s, measured_s = zip(*values, strict=True)
    assert error_factor(predicted_s, measured_s) == pytest.approx(product)
    assert error_factor(measured_s, predicted_s) == pytest.approx(product)


def test_error_factor_of_twice_too_slow_and_twice_too_fast_is_two() -> None:
    assert error_factor([2.0, 1.0], [1.0, 2.0]) == pytest.approx(2)
    assert error_factor([3.0], [3.0]) == 1


@given(st.lists(st.tuples(seconds, seconds, seconds), min_size=1, max_size=20))
def test_coverage_counts_what_lies_inside(values: list[tuple[float, float, float]]) -> None:
    inside, estimates, measured_s = 0, [], []
    for one, other, measured in values:
        low_s, high_s = min(one, other), max(one, other)
        estimates.append(Estimate(seconds=low_s, low_s=low_s, high_s=high_s, peak_bytes=0, source="model"))
        measured_s.append(measured)
        inside += not (measured < low_s or measured > high_s)
    assert math.isclose(coverage(estimates, measured_s), inside / len(values))


def test_metrics_of_nothing_or_of_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="0 predictions for 0 measurements"):
        error_factor([], [])
    with pytest.raises(ValueError, match="1 predictions for 2 measurements"):
        error_factor([1.0], [1.0, 2.0])


@given(st.dictionaries(st.sampled_from("abcdef"), seconds, min_size=1))
def test_a_random_choice_loses_the_mean_over_the_best(measured_s: dict[str, float]) -> None:
    values = list(measured_s.values())
    # Compared one above: a regret of 0 has no digits to lose.
    assert 1 + random_regret(measured_s) == pytest.approx(sum(values) / len(values) / min(values))


def test_a_summary_says_where_the_values_lie() -> None:
    summary = Summary.of([float(value) for value in range(101)])
    assert (summary.mean, summary.median, summary.p90, summary.p95, summary.largest) == pytest.approx(
        (50, 50, 90, 95, 100)
    )
    with pytest.raises(ValueError, match="nothing to summarise"):
        Summary.of([])


def test_relative_errors_and_widths_by_hand() -> None:
    assert relative_errors([2.0, 1.0], [1.0, 2.0]) == [1.0, 0.5]
    estimates = [Estimate(seconds=1.0, low_s=0.1, high_s=h, peak_bytes=0, source="model") for h in (2.0, 8.0)]
    assert interval_factor(estimates) == pytest.approx(4)
