"""When is an estimate good enough to choose by, and what should be measured when it is not?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from subquad_cost_model.estimator import Estimate


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to take now, and what to measure for a better answer.

    `certain`: no rival's interval reaches below the choice's. `to_measure` names the unmeasured rivals that may
    still win, the default among them, most promising first after the default; when it is empty, measuring has
    nothing to add, even if `certain` is False (measured alike).
    """

    choice: str
    certain: bool
    to_measure: tuple[str, ...]
    reason: str


def decide(estimates: Mapping[str, Estimate], default: str) -> Decision:
    """Choose a rival only if its pessimistic bound does not lose to the default; else the default stays.

        eligible = {k : high_k <= b},   b = median of the default if it was measured, else low of the default
        choice   = the best of the eligible by median if measured, else by high; the default if there is none
        open     = {k : low_k <= min_j high_j}      those that may still be the fastest

    An estimate's own `seconds` decides nothing unless it was measured: that is what makes the rule safe under a
    wrong model. If more than one is open, the unmeasured ones among them are `to_measure`.

    Raises: ValueError when the default has no estimate.
    """
    if default not in estimates:
        raise ValueError(f"the default {default!r} is not among the estimates: {', '.join(estimates) or 'none'}")
    to_beat_s = _beaten_below_s(estimates[default])
    eligible = [name for name in estimates if name != default and estimates[name].high_s <= to_beat_s]
    choice = min(eligible, key=lambda name: _judged_by_s(estimates[name]), default=default)
    best_high_s = min(estimate.high_s for estimate in estimates.values())
    still_open = [name for name, estimate in estimates.items() if estimate.low_s <= best_high_s]
    to_measure = tuple(
        sorted(
            (name for name in still_open if len(still_open) > 1 and estimates[name].source != "measured"),
            key=lambda name: (name != default, estimates[name].low_s),
        )
    )
    certain = all(estimate.low_s >= estimates[choice].high_s for name, estimate in estimates.items() if name != choice)
    return Decision(
        choice=choice,
        certain=certain,
        to_measure=to_measure,
        reason=_reason(choice, default, certain, to_measure, estimates),
    )


def _beaten_below_s(estimate: Estimate) -> float:
    return estimate.seconds if estimate.source == "measured" else estimate.low_s


def _judged_by_s(estimate: Estimate) -> float:
    return estimate.seconds if estimate.source == "measured" else estimate.high_s


def _reason(
    choice: str, default: str, certain: bool, to_measure: tuple[str, ...], estimates: Mapping[str, Estimate]
) -> str:
    if len(estimates) == 1:
        return f"{choice} is the only candidate"
    source = estimates[choice].source
    if certain:
        return f"{choice} is faster than every rival at its slowest ({source})"
    if to_measure:
        return f"{choice} until measured: {', '.join(to_measure)} may be faster"
    if choice == default:
        return f"{default} stays: no rival is surely faster ({source})"
    return f"{choice} is the fastest by median and surely no slower than {default} ({source})"
