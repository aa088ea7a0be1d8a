"""A rival is chosen only if it cannot lose to the default; what could still change that is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad_cost_model import Estimate, decide
from subquad_cost_model.estimator import Source


def estimate(low_s: float, seconds: float, high_s: float, source: Source = "model") -> Estimate:
    return Estimate(seconds=seconds, low_s=low_s, high_s=high_s, peak_bytes=0, source=source)


figures = st.lists(st.floats(1e-6, 1.0), min_size=3, max_size=3).map(sorted)
sources: st.SearchStrategy[Source] = st.sampled_from(["bound", "model", "measured", "constant"])
estimates_of_any_kind = st.builds(
    lambda three, source: estimate(three[0], three[1], three[2], source), figures, sources
)
candidates = st.dictionaries(st.sampled_from("abcde"), estimates_of_any_kind, max_size=5).flatmap(
    lambda rivals: estimates_of_any_kind.map(lambda default: {**rivals, "default": default})
)


@given(candidates)
def test_never_picks_a_kernel_that_pessimistically_loses_to_the_default(estimates: dict[str, Estimate]) -> None:
    decision = decide(estimates, "default")
    if decision.choice != "default":
        default = estimates["default"]
        assert estimates[decision.choice].high_s <= (default.seconds if default.source == "measured" else default.low_s)


@given(candidates, st.randoms())
def test_whatever_the_truth_inside_the_intervals_a_certain_choice_is_the_best(
    estimates: dict[str, Estimate], random: st.DataObject
) -> None:
    decision = decide(estimates, "default")
    truth_s = {name: random.uniform(e.low_s, e.high_s) for name, e in estimates.items()}  # type: ignore[attr-defined]
    if decision.certain:
        assert truth_s[decision.choice] <= min(truth_s.values()) * (1 + 1e-12)


@given(candidates)
def test_what_is_to_be_measured_is_unmeasured_and_could_be_the_fastest(estimates: dict[str, Estimate]) -> None:
    decision = decide(estimates, "default")
    best_high_s = min(e.high_s for e in estimates.values())
    for name in decision.to_measure:
        assert estimates[name].source != "measured"
        assert estimates[name].low_s <= best_high_s
    # Nothing unmeasured is left out that could be: unless it is alone.
    could = {name for name, e in estimates.items() if e.low_s <= best_high_s}
    left_out = {name for name in could if estimates[name].source != "measured"} - set(decision.to_measure)
    assert not left_out or len(could) == 1


@given(candidates)
def test_measuring_what_is_asked_for_leaves_nothing_to_measure(estimates: dict[str, Estimate]) -> None:
    """One round is enough: a host that measures `to_measure` once does not loop."""
    asked = decide(estimates, "default").to_measure
    measured = {n: estimate(e.seconds, e.seconds, e.seconds, "measured") for n, e in estimates.items() if n in asked}
    again = decide({**estimates, **measured}, "default")
    assert set(again.to_measure).isdisjoint(asked)


def test_overlapping_estimates_leave_the_default_and_ask_for_both() -> None:
    decision = decide({"new": estimate(1, 2, 9), "old": estimate(3, 5, 9)}, "old")
    assert (decision.choice, decision.certain, decision.to_measure) == ("old", False, ("old", "new"))
    assert "new" in decision.reason


def test_a_rival_that_surely_wins_is_taken_without_measuring() -> None:
    decision = decide({"new": estimate(1, 2, 3), "old": estimate(3, 5, 9)}, "old")
    assert (decision.choice, decision.certain) == ("new", True)
    separated = decide({"new": estimate(1, 2, 2.9), "old": estimate(3, 5, 9)}, "old")
    assert (separated.choice, separated.certain, separated.to_measure) == ("new", True, ())


def test_two_rivals_that_both_beat_the_default_are_measured_and_the_safer_serves_meanwhile() -> None:
    rivals = {"safe": estimate(1, 2, 3), "bold": estimate(0.5, 1, 4), "old": estimate(5, 6, 7)}
    decision = decide(rivals, "old")
    assert (decision.choice, decision.certain, decision.to_measure) == ("safe", False, ("bold", "safe"))


def test_a_measured_rival_replaces_a_measured_default_when_its_slowest_repeat_is_below_the_default_s_median() -> None:
    old = estimate(0.9, 1.2, 1.6, "measured")
    assert decide({"new": estimate(0.8, 1.0, 1.1, "measured"), "old": old}, "old").choice == "new"
    assert decide({"new": estimate(0.8, 1.0, 1.3, "measured"), "old": old}, "old").choice == "old"


def test_kernels_measured_alike_leave_the_default_and_nothing_to_measure() -> None:
    alike = {name: estimate(0.9, 1.0, 1.1, "measured") for name in ("new", "old")}
    decision = decide(alike, "old")
    assert (decision.choice, decision.certain, decision.to_measure) == ("old", False, ())


def test_a_measured_rival_does_not_beat_a_default_that_was_only_predicted_slower() -> None:
    decision = decide({"new": estimate(1.9, 2, 2.1, "measured"), "old": estimate(1, 30, 90, "bound")}, "old")
    assert (decision.choice, decision.to_measure) == ("old", ("old",))


def test_an_only_candidate_is_certain() -> None:
    decision = decide({"old": estimate(1, 2, 3)}, "old")
    assert (decision.choice, decision.certain, decision.to_measure) == ("old", True, ())


def test_a_default_without_an_estimate_is_refused() -> None:
    with pytest.raises(ValueError, match="'old' is not among the estimates: new"):
        decide({"new": estimate(1, 2, 3)}, "old")
