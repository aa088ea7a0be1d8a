"""How good predictions and choices were: regret first, error last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from subquad_cost_model.estimator import Estimate

T = TypeVar("T")


def regret(chosen: str, measured_s: Mapping[str, float]) -> float:
    """Latency lost by the choice: chosen / best measured - 1; 0 when the best was chosen.

    Raises: ValueError when the chosen rival was not measured.
    """
    if chosen not in measured_s:
        raise ValueError(f"{chosen!r} was not measured; measured: {', '.join(measured_s) or 'none'}")
    return measured_s[chosen] / min(measured_s.values()) - 1


def error_factor(predicted_s: Sequence[float], measured_s: Sequence[float]) -> float:
    """Geometric mean of max(predicted / measured, measured / predicted): 1 is exact, 2 is off by two either way."""
    ratios = [math.log(predicted / measured) for predicted, measured in _pairs(predicted_s, measured_s)]
    return math.exp(math.fsum(abs(ratio) for ratio in ratios) / len(ratios))


def coverage(estimates: Sequence[Estimate], measured_s: Sequence[float]) -> float:
    """Share of the measured seconds that lie inside their estimates' intervals, ends included."""
    inside = [estimate.low_s <= measured <= estimate.high_s for estimate, measured in _pairs(estimates, measured_s)]
    return sum(inside) / len(inside)


def _pairs(predictions: Sequence[T], measured_s: Sequence[float]) -> list[tuple[T, float]]:
    if len(predictions) != len(measured_s) or not predictions:
        raise ValueError(f"{len(predictions)} predictions for {len(measured_s)} measurements")
    return list(zip(predictions, measured_s, strict=True))
