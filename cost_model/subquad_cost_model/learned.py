"""The learned model: the analytic bound, times what kernels were learned to take beyond it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from subquad_cost_model.bound import lower_bound_s
from subquad_cost_model.device import Device
from subquad_cost_model.envelope import Smaller, largest_below, with_smaller
from subquad_cost_model.estimator import Estimate, Estimator
from subquad_cost_model.head import Head, TooFewRowsError
from subquad_cost_model.roofline import RooflineEstimator
from subquad_cost_model.rows import CostRow
from subquad_cost_model.terms import BYTES, SECONDS
from subquad_cost_model.timed_rows import TimedRow, timed
from subquad_cost_model.trees import USUAL, Trees

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

    `peak_bytes` are those of the phase's peak head, and the counted bytes where there is none or it knows no such row.
    """

    heads: Mapping[str, Head]
    peaks: Mapping[str, Head] = field(default_factory=dict)
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
        physics: bool = True,
    ) -> LearnedEstimator:
        """A head per phase that has rows enough, and one for its peak memory if that was observed.

        Each is a physical sum and what that leaves, or with `physics` False trees alone.

        Raises: ValueError when no phase has rows enough; ModuleNotFoundError without lightgbm.
        """
        able = timed(rows)
        heads: dict[str, Head] = {}
        too_few: list[str] = []
        for phase in sorted({row.row.phase for row in able}):
            of_phase = [row for row in able if row.row.phase == phase]
            try:
                heads[phase] = _latency_head(of_phase, level, trees, SECONDS if physics else ())
            except TooFewRowsError as error:
                too_few.append(f"{phase}: {error}")
        if not heads:
            raise ValueError(f"nothing to fit ({'; '.join(too_few) or 'no row was timed'})")
        peaks: dict[str, Head] = {}
        for phase in heads:
            observed = [row for row in able if row.row.phase == phase and row.peak_bytes and _counted_bytes(row.row)]
            with contextlib.suppress(TooFewRowsError):  # counted bytes answer
                peaks[phase] = _peak_head(observed, level, trees, BYTES if physics else ())
        return cls(heads=heads, peaks=peaks, smaller=smaller)

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
        bound_s = np.array([lower_bound_s(row, device) for row in rows])
        lowest = np.empty(len(rows))
        for phase in {row.phase for row in rows}:
            here = [index for index, row in enumerate(rows) if row.phase == phase]
            z[here], width[here] = self.heads[phase].predict([rows[i] for i in here], device, bound_s[here])
            lowest[here] = self.heads[phase].lowest
        floor = np.minimum(PROBE_FLOOR if device.origin == "probed" else SHEET_FLOOR, lowest)
        low_s = bound_s * np.exp(np.maximum(z - width, floor))
        high_s = bound_s * np.exp(np.minimum(z + width, np.maximum(z, CEILING)))
        return (bound_s * np.exp(z)).tolist(), low_s.tolist(), high_s.tolist()

    def _peaks(self, rows: Sequence[CostRow], device: Device) -> list[int]:
        counted = [_counted_bytes(row) for row in rows]
        for phase, head in self.peaks.items():
            known = [i for i, row in enumerate(rows) if row.phase == phase and head.knows(row)]
            bounds = np.array([counted[index] for index in known], dtype=np.float64)
            z, _ = head.predict([rows[index] for index in known], device, bounds)
            for index, ratio in zip(known, np.exp(z), strict=True):
                counted[index] = round(counted[index] * float(ratio))
        return counted


def _latency_head(rows: Sequence[TimedRow], level: float, trees: Trees, terms: tuple[str, ...]) -> Head:
    bounds = np.array([lower_bound_s(row.row, row.device) for row in rows])
    z = np.log(np.array([row.seconds for row in rows]) / bounds)
    doubts = np.array([row.doubt for row in rows])
    return Head.fit(
        [row.row for row in rows], [row.paced_device for row in rows], z,
        level=level, trees=trees, doubts=doubts, terms=terms, bounds=bounds, asked=[row.device for row in rows],
    )  # fmt: skip


def _peak_head(rows: Sequence[TimedRow], level: float, trees: Trees, terms: tuple[str, ...]) -> Head:
    bounds = np.array([_counted_bytes(row.row) for row in rows], dtype=np.float64)
    z = np.log(np.array([row.peak_bytes for row in rows], dtype=np.float64) / bounds)
    return Head.fit(
        [row.row for row in rows], [row.device for row in rows], z,
        level=level, trees=trees, terms=terms, bounds=bounds, far=False,
    )  # fmt: skip


def _counted_bytes(row: CostRow) -> int:
    """Inputs, outputs, and what the forward keeps: the bound of the peak."""
    return row.bytes_moved + row.saved_bytes
