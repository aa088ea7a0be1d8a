"""A model that was fitted elsewhere, corrected by a few rows measured on the device at hand.

    seconds = overhead_k + factor_k * prod over s of f_s(row) ^ w_s         per phase, k the kernel

f_s are the seconds that the source model gives for this device and, where there are some, for devices it was fitted
to; w_s >= 0 (least squares of logarithms, Lawson and Hanson 1974, pulled to uniform weights). Corrections from none
to all of these compete, and the one that errs least on shapes left out wins: sixteen rows cannot pay for everything.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares, nnls

from subquad_cost_model.bound import lower_bound_s
from subquad_cost_model.conformal import grouped_quantile
from subquad_cost_model.device import Device
from subquad_cost_model.estimator import Estimate, Estimator
from subquad_cost_model.features import Floats
from subquad_cost_model.rows import CostRow
from subquad_cost_model.shape_groups import fold, shape_group
from subquad_cost_model.timed_rows import TimedRow, timed

KINDS = ("none", "shift", "kernels", "overhead")
"""From the simplest on: nothing; one factor; a factor per kernel; an overhead and a factor per kernel."""
SHRINK = 1.0
"""So many rows of no deviation stand beside those of each kernel."""
PULL, OUTLIER = 0.3, 0.3
"""How firmly overhead and factor of a kernel are held near those of all kernels; log errors beyond the second count
by their size, not its square."""
MOST_FOLDS = 20
LEAST_SHAPES = 5
"""With fewer shapes in a phase nothing can be left out to choose by, and the source stays as it is."""
REACH = 2.0
"""Beyond so many times the largest bound that was measured, or below as small a part of the smallest, the source's
interval counts as well."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """How the source is corrected in one phase. `kernels` hold (overhead in seconds, factor), `reach` the smallest and
    largest bound measured; `width` is half the interval of log seconds, infinite where shapes were too few.

    `errors` are the mean |log error| of each competitor on shapes left out, `rows` how many it was fitted to.
    """

    kind: str
    weights: tuple[float, ...]
    kernels: Mapping[str, tuple[float, float]]
    reach: Mapping[str, tuple[float, float]]
    width: float
    errors: Mapping[str, float]
    rows: int

    def seconds(self, kernel: str, log_source: Floats) -> float:
        """The corrected seconds of one row, whose source seconds are these logarithms."""
        overhead_s, factor = self.kernels[kernel]
        return overhead_s + factor * math.exp(float(log_source @ np.array(self.weights)))


@dataclass(frozen=True, kw_only=True)
class CalibratedEstimator:
    """The source model, corrected on one device for the kernels that were measured there; elsewhere the source.

    `beside` are devices whose source estimates take part, after that for the device itself.
    """

    source: Estimator
    device: Device
    corrections: Mapping[str, Correction]
    beside: tuple[Device, ...] = ()
    level: float = 0.9
    name: str = "calibrated"

    @classmethod
    def fit(
        cls,
        rows: Sequence[TimedRow],
        device: Device,
        source: Estimator,
        *,
        beside: Sequence[Device] = (),
        level: float = 0.9,
    ) -> CalibratedEstimator:
        """Choose and fit a correction for each phase that has shapes enough.

        Raises: ValueError when a row is of another device.
        """
        able = timed(rows)
        strangers = {row.device.name for row in able} - {device.name}
        if strangers:
            raise ValueError(f"rows of {', '.join(sorted(strangers))} say nothing about {device.name}")
        blank = cls(source=source, device=device, corrections={}, beside=tuple(beside), level=level)
        corrections: dict[str, Correction] = {}
        for phase in sorted({row.row.phase for row in able}):
            here = [row for row in able if row.row.phase == phase]
            if len({shape_group(row.row) for row in here}) >= LEAST_SHAPES:
                corrections[phase] = _chosen(here, blank.log_source([row.row for row in here]), device, level)
        return replace(blank, corrections=corrections)

    def log_source(self, rows: Sequence[CostRow]) -> Floats:
        """log seconds of the source: a line per row, a column for the device and each of `beside`."""
        columns = [[e.seconds for e in self.source.predict(rows, on)] for on in (self.device, *self.beside)]
        return np.log(np.array(columns, dtype=np.float64).T).reshape(len(rows), 1 + len(self.beside))

    def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        """One estimate per row, in order; its source is `model` where it was corrected, else what the source says."""
        before = self.source.predict(rows, device)
        if device.name != self.device.name:
            return [replace(estimate, note=f"calibrated for {self.device.name}, not here") for estimate in before]
        asked = [i for i, row in enumerate(rows) if self._correction(row) is not None]
        logs = self.log_source([rows[i] for i in asked])
        found = [
            replace(estimate, note=_join(estimate.note, "not among the kernels it was calibrated by"))
            for estimate in before
        ]
        for i, log_source in zip(asked, logs, strict=True):
            correction = self._correction(rows[i])
            assert correction is not None
            found[i] = self._corrected(rows[i], correction, log_source, before[i])
        return found

    def _correction(self, row: CostRow) -> Correction | None:
        correction = self.corrections.get(row.phase)
        return correction if correction is not None and kernel_key(row) in correction.kernels else None

    def _corrected(self, row: CostRow, correction: Correction, log_source: Floats, before: Estimate) -> Estimate:
        seconds = correction.seconds(kernel_key(row), log_source)
        smallest, largest = correction.reach[kernel_key(row)]
        bound_s = lower_bound_s(row, self.device)
        inside = smallest / REACH <= bound_s <= largest * REACH
        low_s, high_s = seconds * math.exp(-correction.width), seconds * math.exp(correction.width)
        if not inside or not math.isfinite(correction.width):
            low_s = min(before.low_s, seconds, low_s if math.isfinite(correction.width) else seconds)
            high_s = max(before.high_s, seconds, high_s if math.isfinite(correction.width) else seconds)
        note = "" if inside else f"its bound of {bound_s:.1e} s is beyond those it was calibrated by"
        return Estimate(
            seconds=seconds, low_s=low_s, high_s=high_s, peak_bytes=before.peak_bytes, source="model", note=note
        )


def kernel_key(row: CostRow) -> str:
    """The kernel with its operator."""
    return f"{row.operator}/{row.kernel}"


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _chosen(rows: Sequence[TimedRow], log_source: Floats, device: Device, level: float) -> Correction:
    """The correction that errs least on shapes left out, fitted to all rows, as wide as it erred there."""
    groups = [shape_group(row.row) for row in rows]
    kernels = np.array([kernel_key(row.row) for row in rows])
    log_s = np.log([row.seconds for row in rows])
    distinct = sorted(set(groups), key=lambda group: fold(group, 1 << 30))
    places = {group: place % MOST_FOLDS for place, group in enumerate(distinct)}
    folds = np.array([places[group] for group in groups])
    residuals: dict[str, Floats] = {}
    for kind in KINDS:
        for stacked in (False, True) if log_source.shape[1] > 1 and kind != "none" else (False,):
            found = np.empty_like(log_s)
            for number in np.unique(folds):
                out = folds == number
                fitted = _fitted(kind, stacked, kernels[~out], log_source[~out], log_s[~out])
                found[out] = log_s[out] - _predicted(fitted, kernels[out], log_source[out])
            residuals[f"stacked {kind}" if stacked else kind] = np.abs(found)
    errors = {name: float(residual.mean()) for name, residual in residuals.items()}
    best = min(errors, key=lambda name: errors[name])  # the simplest of equals
    kind, stacked = best.removeprefix("stacked "), best.startswith("stacked ")
    weights, of_kernels, shared = _fitted(kind, stacked, kernels, log_source, log_s)
    bounds_s: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        bounds_s[kernel_key(row.row)].append(lower_bound_s(row.row, device))
    return Correction(
        kind=best,
        weights=tuple(weights.tolist()),
        kernels={name: of_kernels.get(name, shared) for name in bounds_s},
        reach={name: (min(values), max(values)) for name, values in bounds_s.items()},
        width=grouped_quantile(residuals[best], groups, level),
        errors=errors,
        rows=len(rows),
    )


_Fitted = tuple[Floats, dict[str, tuple[float, float]], tuple[float, float]]


def _fitted(kind: str, stacked: bool, kernels: np.ndarray, log_source: Floats, log_s: Floats) -> _Fitted:  # type: ignore[type-arg]
    """Weights of the sources, overhead and factor by kernel, and those of kernels that are not among the rows."""
    weights = _weights(log_source, log_s) if stacked else np.eye(log_source.shape[1])[0]
    if kind == "none":
        return weights, {}, (0.0, 1.0)
    base = log_source @ weights
    shift = float(np.median(log_s - base))
    shared = (0.0, math.exp(shift))
    if kind == "shift":
        return weights, {}, shared
    if kind == "overhead":
        # From half of the shortest time: what an overhead is at most, or nearly.
        shared = _overhead(base, log_s, (math.exp(float(log_s.min())) / 2, shared[1]))
    of_kernels = {}
    for name in np.unique(kernels):
        here = kernels == name
        if kind == "overhead":
            of_kernels[str(name)] = _overhead(base[here], log_s[here], shared)
        else:
            deviation = float((log_s[here] - base[here] - shift).sum()) / (here.sum() + SHRINK)
            of_kernels[str(name)] = (0.0, math.exp(shift + deviation))
    return weights, of_kernels, shared


def _weights(log_source: Floats, log_s: Floats) -> Floats:
    """min over w >= 0, b:  || log t - b - F w ||^2 + || w - 1 / S ||^2"""
    centred, target = log_source - log_source.mean(axis=0), log_s - log_s.mean()
    count = log_source.shape[1]
    system = np.vstack([centred, np.eye(count)])
    found, _ = nnls(system, np.concatenate([target, np.full(count, 1 / count)]))
    return np.asarray(found, dtype=np.float64)


def _overhead(base: Floats, log_s: Floats, near: tuple[float, float]) -> tuple[float, float]:
    """min over a, g > 0 of the log errors, those beyond `OUTLIER` by their size alone, and a pull to what is `near`.

    sum of rho(log t - log(a + g f)) + rho(PULL log(g / g_near)) + rho(PULL log(a / a_near))
    """

    def errors(logs: Floats) -> Floats:
        return np.concatenate([log_s - np.logaddexp(logs[0], logs[1] + base), PULL * (logs - np.log(near))])

    found = least_squares(errors, np.log(near), loss="soft_l1", f_scale=OUTLIER).x
    return math.exp(found[0]), math.exp(found[1])


def _predicted(fitted: _Fitted, kernels: np.ndarray, log_source: Floats) -> Floats:  # type: ignore[type-arg]
    weights, of_kernels, shared = fitted
    pairs = np.array([of_kernels.get(str(name), shared) for name in kernels])
    return np.asarray(np.log(pairs[:, 0] + pairs[:, 1] * np.exp(log_source @ weights)), dtype=np.float64)
