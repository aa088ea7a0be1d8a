"""Time callables: warmed up, long enough to be read off the clock, rivals interleaved.

Callables are opaque: pass `synchronize=torch.cuda.synchronize` when they return before their work is done, or a
`clock` that asks the device itself.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

Run = Callable[[], object]
Clock = Callable[[Run, int], float]
"""Makes so many calls and says how many seconds they took."""

# With fewer repeats than this, fastest and slowest say little about the next call (a third repeat falls outside of the
# first two in a third of all cases), so the interval is widened by FEW_REPEATS_FACTOR either way.
ENOUGH_REPEATS = 3
FEW_REPEATS_FACTOR = 1.5
# No Python call is shorter; a clock that does not tick during one must not size a loop for eternity.
SHORTEST_CALL_S = 2e-8
MOST_GROWTH = 10
SHORT_WINDOW_S = 5e-4
MANY_REPEATS = 200


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call: fastest, median and slowest of the repeats."""

    low_s: float
    median_s: float
    high_s: float
    repeats: int


def time_callable(
    run: Run,
    *,
    synchronize: Run | None = None,
    min_s: float = 0.02,
    repeats: int = 5,
    budget_s: float = 2.0,
) -> Timing:
    """How long one call of `run` takes. Arguments as in `time_rivals`."""
    return time_rivals({"": run}, synchronize=synchronize, min_s=min_s, repeats=repeats, budget_s=budget_s)[""]


def time_rivals(
    rivals: Mapping[str, Run],
    *,
    synchronize: Run | None = None,
    min_s: float = 0.02,
    repeats: int = 5,
    budget_s: float = 2.0,
    seed: int = 0,
    warm_up_s: float = 0.0,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """How long one call of each rival takes, timed in rounds of random order so that drift hits all alike.

    Each rival is called twice to warm it up, and on until `warm_up_s` have passed (the last call sizes its loop), then
    once per round in a loop of at least `min_s`. Rounds end after `repeats`, or once `budget_s` is spent, but not
    before the first: slow callables take three calls each, however small the budget. Loops are timed by `clock`; where
    there is none, by the wall, and `synchronize` waits for the device before and after. Python collects no garbage
    meanwhile: with torch loaded that takes as long as thousands of launches.
    """
    with _no_collections():
        samples = _samples_s(rivals, clock or wall_clock(synchronize), min_s, repeats, budget_s, seed, warm_up_s)
    return {name: _timing(of_it) for name, of_it in samples.items()}


def fastest_s(run: Run, *, synchronize: Run | None = None, budget_s: float = 2.0) -> float:
    """The fastest of many short repeats of one call, as read off the clock: what a ceiling is computed from.

    Many and short, because one window that no other program disturbs is enough.
    """
    samples = _samples_s({"": run}, wall_clock(synchronize), SHORT_WINDOW_S, MANY_REPEATS, budget_s, 0)
    return min(samples[""])


def wall_clock(synchronize: Run | None = None) -> Clock:
    """Times a loop of calls from outside, as a caller meets it."""
    return partial(_loop_s, wait=synchronize or _nothing)


def _samples_s(
    rivals: Mapping[str, Run],
    clock: Clock,
    min_s: float,
    repeats: int,
    budget_s: float,
    seed: int,
    warm_up_s: float = 0.0,
) -> dict[str, list[float]]:
    if min_s <= 0 or repeats < 1:
        raise ValueError(f"min_s must be positive and repeats at least 1, not {min_s} and {repeats}")
    started_s = time.perf_counter()
    calls: dict[str, int] = {}
    for name, run in rivals.items():
        clock(run, 1)
        warm_at_s = time.perf_counter() + min(warm_up_s, budget_s / len(rivals))
        once_s = clock(run, 1)
        while time.perf_counter() < warm_at_s:
            once_s = clock(run, 1)
        calls[name] = max(1, math.ceil(min_s / max(once_s, SHORTEST_CALL_S)))
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)
    shuffle = random.Random(seed).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            loop_s = clock(rivals[name], calls[name])
            # A clock that did not tick between two readings must not make a time of zero.
            seconds[name].append(max(loop_s / calls[name], 1e-9))
            if loop_s < min_s / 2:
                # The sizing call was slow by chance; the next loops are longer. Not more than tenfold at once: this
                # loop may have been fast by chance, or have ended within a tick of the clock.
                calls[name] = math.ceil(calls[name] * min(min_s / max(loop_s, 1e-9), MOST_GROWTH))
        if time.perf_counter() - started_s > budget_s:
            break
    return seconds


def _loop_s(run: Run, calls: int, wait: Run) -> float:
    wait()
    started_s = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return time.perf_counter() - started_s


def _timing(seconds: list[float]) -> Timing:
    widening = 1.0 if len(seconds) >= ENOUGH_REPEATS else FEW_REPEATS_FACTOR
    return Timing(
        low_s=min(seconds) / widening,
        median_s=statistics.median(seconds),
        high_s=max(seconds) * widening,
        repeats=len(seconds),
    )


@contextmanager
def _no_collections() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _nothing() -> None:
    """Callables that return when their work is done need no waiting."""
