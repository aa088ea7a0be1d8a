"""Times are per call, rivals come out in their true order, and budgets bound the work."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from subquad_cost_model import HostPace, Timing, time_callable, time_rivals
from subquad_cost_model import host_pace as pace
from subquad_cost_model.measure import ENOUGH_REPEATS, FEW_REPEATS_FACTOR


class Clock:
    """A clock that only callables advance: what they take is known exactly."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s

    def lasting(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now_s += seconds

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.perf_counter)
    return clock


def spin(steps: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(steps):
            pass

    return run


def test_two_callables_of_a_known_ratio_come_out_in_order() -> None:
    """Ten to one, within three either way; by the fastest repeats, because other programs may run meanwhile."""
    timings = time_rivals({"slow": spin(20_000), "fast": spin(2_000)}, min_s=5e-4, repeats=100)
    assert 3 < timings["slow"].low_s / timings["fast"].low_s < 30
    assert all(timing.low_s <= timing.median_s <= timing.high_s for timing in timings.values())


def test_loops_are_timed_by_the_clock_that_is_given(clock: Clock) -> None:
    """A device may count only what it does itself: here half of what passes on the wall."""

    def half(run: Callable[[], object], calls: int) -> float:
        started_s = clock.now_s
        for _ in range(calls):
            run()
        return (clock.now_s - started_s) / 2

    timings = time_rivals({"a": clock.lasting(0.1), "b": clock.lasting(0.01)}, clock=half, budget_s=100)
    assert timings["a"].median_s == pytest.approx(0.05)
    assert timings["b"].median_s == pytest.approx(0.005)


@pytest.mark.parametrize(("warm_up_s", "calls"), [(0.0, 2), (0.95, 11)])
def test_a_rival_is_warmed_up_for_as_long_as_is_asked(warm_up_s: float, calls: int, clock: Clock) -> None:
    run = clock.lasting(0.1)
    made: list[float] = []
    time_rivals({"": lambda: made.append(clock.now_s) or run()}, warm_up_s=warm_up_s, repeats=1, budget_s=100)
    assert len(made) == calls + 1


def test_python_collects_no_garbage_while_it_times_and_does_afterwards(clock: Clock) -> None:
    seen: list[bool] = []

    def run() -> None:
        seen.append(gc.isenabled())
        clock.now_s += 0.1
        if len(seen) == 9:
            raise ZeroDivisionError

    time_rivals({"": run}, repeats=3)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        time_rivals({"": run}, repeats=9)
    assert gc.isenabled()
    assert seen == [False] * 9


def test_the_hosts_pace_is_the_median_window_by_its_launches(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, calls = HostPace("cpu"), []

    def counted(self: torch.Tensor, factor: float) -> torch.Tensor:
        calls.append(factor)
        clock.now_s += 0.3 if len(calls) <= pace.ROUNDS else 0.006  # the first window is disturbed
        return self * factor

    monkeypatch.setattr(torch.Tensor, "mul", counted)
    assert ask() == pytest.approx(0.002)
    assert len(calls) == pace.WINDOWS * pace.ROUNDS


def test_times_are_per_call_whatever_the_loop(clock: Clock) -> None:
    timings = time_rivals({"long": clock.lasting(0.5), "short": clock.lasting(1e-5)}, budget_s=100)
    assert timings["long"].median_s == pytest.approx(0.5)
    assert timings["short"].median_s == pytest.approx(1e-5)
    assert timings["short"].repeats == 5


def test_a_drift_hits_all_rivals_alike(clock: Clock) -> None:
    """The machine slows down steadily; equal rivals still come out equal, in whatever order they are given."""

    def drifting() -> None:
        clock.now_s += 1e-3 * (1 + (clock.now_s - 100.0))

    timings = time_rivals({name: drifting for name in "abcd"}, repeats=101, budget_s=1e9)
    medians_s = [timing.median_s for timing in timings.values()]
    assert max(medians_s) / min(medians_s) < 1.25
    drift = max(t.high_s for t in timings.values()) / min(t.low_s for t in timings.values())
    assert drift > 50, "the drift was there"


def test_rounds_are_shuffled_and_repeatable(clock: Clock) -> None:
    def order(seed: int) -> list[str]:
        called: list[str] = []

        def rival(name: str) -> Callable[[], None]:
            def run() -> None:
                called.append(name)
                clock.now_s += 1.0

            return run

        time_rivals({name: rival(name) for name in "abc"}, repeats=6, budget_s=1e9, seed=seed)
        return called[6:]

    rounds = ["".join(order(0)[start : start + 3]) for start in range(0, 18, 3)]
    assert all(sorted(of_it) == list("abc") for of_it in rounds)
    assert len(set(rounds)) > 1
    assert order(0) == order(0) != order(1)


def test_the_budget_ends_the_rounds_but_not_before_the_first(clock: Clock) -> None:
    timing = time_callable(clock.lasting(1.0), budget_s=0.5)
    assert timing.repeats == 1
    assert clock.now_s == 103.0, "two calls to warm up and one that counts"
    assert time_callable(clock.lasting(1.0), budget_s=4.5).repeats == 3


def test_few_repeats_give_a_wider_interval(clock: Clock) -> None:
    once = time_callable(clock.lasting(1.0), budget_s=0.5)
    assert (once.low_s, once.high_s) == pytest.approx((1 / FEW_REPEATS_FACTOR, FEW_REPEATS_FACTOR))
    enough = time_callable(clock.lasting(1.0), repeats=ENOUGH_REPEATS, budget_s=100)
    assert (enough.low_s, enough.high_s) == pytest.approx((1, 1))


def test_the_first_call_does_not_count(clock: Clock) -> None:
    calls: list[float] = []

    def compiles_first() -> None:
        calls.append(clock.now_s)
        clock.now_s += 10.0 if len(calls) == 1 else 0.1

    assert time_callable(compiles_first, budget_s=1.0).high_s <= 0.1 * FEW_REPEATS_FACTOR + 1e-9


def test_a_sizing_call_that_was_slow_by_chance_does_not_shorten_all_loops(clock: Clock) -> None:
    calls: list[int] = []

    def hiccups_second() -> None:
        calls.append(1)
        clock.now_s += 0.02 if len(calls) == 2 else 1e-6

    timing = time_callable(hiccups_second, repeats=8, budget_s=100)
    assert len(calls) > 3 * 10_000, "later loops last about min_s again"
    assert timing.median_s == pytest.approx(1e-6)


def test_work_that_outlives_its_call_is_waited_for(clock: Clock) -> None:
    pending: list[float] = []

    def synchronize() -> None:
        clock.now_s += sum(pending)
        pending.clear()

    timing = time_callable(lambda: pending.append(0.25), synchronize=synchronize, budget_s=100)
    assert timing.median_s == pytest.approx(0.25)


def test_a_callable_below_the_clock_s_resolution_takes_some_time(clock: Clock) -> None:
    timing: Timing = time_callable(clock.lasting(0.0), min_s=1e-6, budget_s=1.0)
    assert 0 < timing.low_s <= timing.high_s <= 1e-8


def test_an_exception_of_a_rival_is_the_callers_to_see() -> None:
    def breaks() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        time_rivals({"breaks": breaks, "works": lambda: None})


@pytest.mark.parametrize("bad", [{"min_s": 0.0}, {"repeats": 0}])
def test_impossible_arguments_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="min_s must be positive and repeats at least 1"):
        time_callable(lambda: None, **bad)  # type: ignore[arg-type]


def test_importing_the_cost_model_imports_no_torch() -> None:
    script = "import sys, subquad_cost_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_real_time_is_what_the_clock_says() -> None:
    timing = time_callable(lambda: time.sleep(0.01), min_s=0.01, repeats=3)
    assert 0.01 <= timing.median_s < 0.1
