"""The floor: every call of an operator takes the same time, whatever its shape."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from subquad_cost_model.device import Device
from subquad_cost_model.estimator import Estimate
from subquad_cost_model.measurements import Measurement
from subquad_cost_model.rows import CostRow


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Seconds of one call, with an interval."""

    seconds: float
    low_s: float
    high_s: float


# Nothing is known: a launch takes microseconds, the longest sensible call a second, and this is between them.
UNKNOWN = Constant(seconds=1e-3, low_s=1e-6, high_s=1.0)


@dataclass(frozen=True, kw_only=True)
class ConstantEstimator:
    """Answers one constant per operator. A model that does not beat it has learned nothing."""

    per_operator: Mapping[str, Constant] = field(default_factory=dict)
    otherwise: Constant = UNKNOWN
    name: str = "constant"

    @classmethod
    def fit(cls, measurements: Iterable[Measurement]) -> ConstantEstimator:
        """Geometric mean of the measured medians per operator; the interval spans what was measured."""
        per_operator: dict[str, list[Measurement]] = defaultdict(list)
        for measurement in measurements:
            per_operator[json.loads(measurement.row_key)["operator"]].append(measurement)
        return cls(per_operator={operator: _constant(of_it) for operator, of_it in per_operator.items()})

    def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        """One estimate per row, in order; neither shape nor device matters."""
        constants = (self.per_operator.get(row.operator, self.otherwise) for row in rows)
        return [
            Estimate(
                seconds=constant.seconds,
                low_s=constant.low_s,
                high_s=constant.high_s,
                peak_bytes=row.bytes_moved + row.saved_bytes,
                source="constant",
            )
            for row, constant in zip(rows, constants, strict=True)
        ]


def _constant(measurements: Sequence[Measurement]) -> Constant:
    logs = [math.log(measurement.median_s) for measurement in measurements]
    low_s = min(measurement.low_s for measurement in measurements)
    high_s = max(measurement.high_s for measurement in measurements)
    # The mean of equal logarithms may round to just outside of the interval.
    mean_s = min(max(math.exp(math.fsum(logs) / len(logs)), low_s), high_s)
    return Constant(seconds=mean_s, low_s=low_s, high_s=high_s)
