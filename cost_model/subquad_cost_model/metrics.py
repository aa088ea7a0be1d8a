"""How good predictions and choices were: regret first, error last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from subquad_cost_model.estimator import Estimate

T = TypeVar("T")


def regret(chosen: str, measured_s: Mapping[str, float]) -> float:
    """Latency lost by the choice: chosen / best measured - 1; 0 when the best was chosen.

    Raises: ValueError when the chosen rival was not measured.
    """
    if chosen not in measured_s:
        raise ValueError(f"{chosen!r} was not measured; measured: {', '.join(measured_s) or 'none'}")
    return measured_s[chosen] / min(measured_s.values()) - 1


def random_regret(measured_s: Mapping[str, float]) -> float:
    """What a choice at random loses on average."""
    return sum(regret(name, measured_s) for name in measured_s) / len(measured_s)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of many values: their mean, median, ninth decile, 95th percentile and largest."""

    mean: float
    median: float
    p90: float
    p95: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Raises: ValueError when there are none."""
        if not len(values):
            raise ValueError("nothing to summarise")
        median, p90, p95 = np.quantile(values, [0.5, 0.9, 0.95]).tolist()
        return cls(mean=float(np.mean(values)), median=median, p90=p90, p95=p95, largest=float(np.max(values)))


def relative_errors(predicted_s: Sequence[float], measured_s: Sequence[float]) -> list[float]:
    """|predicted / measured - 1| of each: their mean is the MAPE."""
    return [abs(predicted / measured - 1) for predicted, measured in _pairs(predicted_s, measured_s)]


def interval_factor(estimates: Sequence[Estimate]) -> float:
    """Geometric mean of high / seconds: intervals are as narrow as this factor either way."""
    return math.exp(sum(math.log(estimate.high_s / estimate.seconds) for estimate in estimates) / len(estimates))


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
