"""Answers from the record where the very row was measured on this device, else from another estimator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subquad_cost_model.device import Device
from subquad_cost_model.estimator import Estimate, Estimator
from subquad_cost_model.measurements import MeasurementStore
from subquad_cost_model.rows import CostRow


@dataclass(frozen=True)
class MeasuredEstimator:
    """The median of the repeats, with their fastest and slowest as interval; `fallback` for what was not measured."""

    measurements: MeasurementStore
    fallback: Estimator
    name: str = "measured"

    def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        """One estimate per row, in order; its source says whether it was measured."""
        found = [self.measurements.find(row, device) for row in rows]
        unmeasured = [row for row, measurement in zip(rows, found, strict=True) if measurement is None]
        predicted = iter(self.fallback.predict(unmeasured, device) if unmeasured else [])
        return [
            next(predicted)
            if measurement is None
            else Estimate(
                seconds=measurement.median_s,
                low_s=measurement.low_s,
                high_s=measurement.high_s,
                peak_bytes=measurement.peak_bytes,
                source="measured",
            )
            for measurement in found
        ]
