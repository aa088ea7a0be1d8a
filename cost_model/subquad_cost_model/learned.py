"""The learned model: the analytic bound, times what trees have learned kernels to take beyond it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from subquad_cost_model.bound import lower_bound_s
from subquad_cost_model.device import Device
from subquad_cost_model.envelope import Smaller, largest_below, with_smaller
from subquad_cost_model.estimator import Estimate, Estimator
from subquad_cost_model.head import USUAL, Head, TooFewRowsError, Trees
from subquad_cost_model.roofline import RooflineEstimator
from subquad_cost_model.rows import CostRow
from subquad_cost_model.timed_rows import TimedRow, timed

# z may be a little below 0 on a data sheet (boost above the stated clock), and below log(1/2) on a probe
# (`Efficiency.best`); nothing is faster.
SHEET_FLOOR, PROBE_FLOOR = -0.05, -math.log(2)
CEILING = 12.0
"""No interval reaches beyond z of this, 160,000 times the bound: what has been seen at most is 40,000."""


@dataclass(frozen=True, kw_only=True)
class LearnedEstimator:
    """Answers bound * exp(z), where a head per phase has learned z from measured rows.

        seconds = bound exp(z),   low, high = bound exp(z -+ width spread)    (within what is physical and CEILING)

    With `smaller` (which halves a row's axes; the host knows how work is counted) the three are running maxima over
    all halvings of the shape, so that a doubled shape never takes less.

    Outside of what a head saw - another kernel, dtype or kind of device, a larger or smaller shape - it abstains:
    interval, bytes and source are those of `otherwise`, and the note says why. The seconds are still the head's where
    it can be asked at all, moved into that interval: beyond 4096 tokens they were 13 % off, where the bound is off by
    a factor of five, but intervals held only 68 %. `abstains` False takes the head's intervals all the same.

    `peak_bytes` are the peak head's, and the counted bytes where there is none or it knows no such row.
    """

    heads: Mapping[str, Head]
    peak: Head | None = None
    otherwise: Estimator = field(default_factory=RooflineEstimator)
    smaller: Smaller | None = None
    abstains: bool = True
    name: str = "learned"

    @classmethod
    def fit(
        cls,
        rows: Iterable[TimedRow],
        *,
        level: float = 0.9,
        trees: Trees = USUAL,
        smaller: Smaller | None = None,
    ) -> LearnedEstimator:
        """A head per phase that has rows enough, and one for peak memory if it was observed.

        Raises: ValueError when no phase has rows enough; ModuleNotFoundError without lightgbm.
        """
        able = timed(rows)
        heads: dict[str, Head] = {}
        too_few: list[str] = []
        for phase in sorted({row.row.phase for row in able}):
            of_phase = [row for row in able if row.row.phase == phase]
            try:
                heads[phase] = _head(of_phase, [_log_latency(row) for row in of_phase], level, trees)
            except TooFewRowsError as error:
                too_few.append(f"{phase}: {error}")
        if not heads:
            raise ValueError(f"nothing to fit ({'; '.join(too_few) or 'no row was timed'})")
        observed = [row for row in able if row.peak_bytes and _counted_bytes(row.row)]
        peak = None
        if observed:
            try:
                peak = _head(observed, [_log_peak(row) for row in observed], level, trees)
            except TooFewRowsError:
                peak = None  # counted bytes answer
        return cls(heads=heads, peak=peak, smaller=smaller)

    def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        """One estimate per row, in order; its source is `model`, or that of `otherwise` with a note."""
        refusals = [self._refusal(row, device) for row in rows]
        answered = [row for row, refusal in zip(rows, refusals, strict=True) if refusal is None]
        left = [row for row, refusal in zip(rows, refusals, strict=True) if refusal is not None]
        learned: Iterator[Estimate] = iter(self._learned(answered, device) if answered else [])
        others = iter(self._moved(self.otherwise.predict(left, device), left, device) if left else [])
        return [
            next(learned) if refusal is None else replace(next(others), note=f"the learned model abstains: {refusal}")
            for refusal in refusals
        ]

    def _moved(self, estimates: Sequence[Estimate], rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        """The estimates, with the heads' seconds where these can be asked and the intervals allow."""
        asked = [
            i for i, row in enumerate(rows) if row.phase in self.heads and device.kind in self.heads[row.phase].kinds
        ]
        seconds, _, _ = self._seconds([rows[i] for i in asked], device)
        moved = list(estimates)
        for i, value in zip(asked, seconds, strict=True):
            moved[i] = replace(moved[i], seconds=min(max(value, moved[i].low_s), moved[i].high_s))
        return moved

    def _refusal(self, row: CostRow, device: Device) -> str | None:
        if row.phase not in self.heads:
            return f"no head for phase {row.phase}"
        return self.heads[row.phase].refusal(row, device) if self.abstains else None

    def _learned(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        def halvings(row: CostRow) -> list[CostRow]:
            halved = self.smaller(row) if self.smaller else ()
            return [half for half in halved if self._refusal(half, device) is None]

        lattice = with_smaller(rows, halvings)
        asked = [row for row, _ in lattice.values()]
        below = {key: keys for key, (_, keys) in lattice.items()}
        seconds, low_s, high_s = (
            largest_below(dict(zip(lattice, values, strict=True)), below) for values in self._seconds(asked, device)
        )
        peaks = self._peaks(rows, device)
        return [
            Estimate(
                seconds=seconds[row.key],
                low_s=min(low_s[row.key], seconds[row.key]),
                high_s=max(high_s[row.key], seconds[row.key]),
                peak_bytes=peak,
                source="model",
            )
            for row, peak in zip(rows, peaks, strict=True)
        ]

    def _seconds(self, rows: Sequence[CostRow], device: Device) -> tuple[list[float], list[float], list[float]]:
        """Seconds, low and high of each row by itself."""
        z, width = np.empty(len(rows)), np.empty(len(rows))
        lowest = np.empty(len(rows))
        for phase in {row.phase for row in rows}:
            here = [index for index, row in enumerate(rows) if row.phase == phase]
            z[here], width[here] = self.heads[phase].predict([rows[index] for index in here], device)
            lowest[here] = self.heads[phase].lowest
        floor = np.minimum(PROBE_FLOOR if device.origin == "probed" else SHEET_FLOOR, lowest)
        bound_s = np.array([lower_bound_s(row, device) for row in rows])
        low_s = bound_s * np.exp(np.maximum(z - width, floor))
        high_s = bound_s * np.exp(np.minimum(z + width, np.maximum(z, CEILING)))
        return (bound_s * np.exp(z)).tolist(), low_s.tolist(), high_s.tolist()

    def _peaks(self, rows: Sequence[CostRow], device: Device) -> list[int]:
        counted = [_counted_bytes(row) for row in rows]
        if self.peak is None:
            return counted
        known = [index for index, row in enumerate(rows) if self.peak.refusal(row, device) is None]
        z, _ = self.peak.predict([rows[index] for index in known], device)
        for index, ratio in zip(known, np.exp(z), strict=True):
            counted[index] = round(counted[index] * float(ratio))
        return counted


def _head(rows: Sequence[TimedRow], z: Sequence[float], level: float, trees: Trees) -> Head:
    return Head.fit([row.row for row in rows], [row.device for row in rows], np.array(z), level=level, trees=trees)


def _log_latency(row: TimedRow) -> float:
    return math.log(row.seconds / lower_bound_s(row.row, row.device))


def _log_peak(row: TimedRow) -> float:
    assert row.peak_bytes is not None
    return math.log(row.peak_bytes / _counted_bytes(row.row))


def _counted_bytes(row: CostRow) -> int:
    """Inputs, outputs, and what the forward keeps: the bound of the peak."""
    return row.bytes_moved + row.saved_bytes
