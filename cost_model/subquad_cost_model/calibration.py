"""A model that was fitted elsewhere, corrected by a few rows measured on the device at hand.

    seconds = (overhead_k + factor_k * prod over s of f_s(row) ^ w_s) * e^g(row)         per phase, k the kernel

f_s are the seconds that the source model gives for this device and, where there are some, for devices it was fitted
to; w_s >= 0 (least squares of logarithms, Lawson and Hanson 1974, pulled to uniform weights). g is a Gaussian process
of what a factor per kernel leaves (`gaussian_process`), whose shares are of what each term takes at the ceilings of the
device: from some dozens of rows it learns which unit is slower here than the source expects, and for which shapes.
Corrections from none to all of these compete, and the one that errs least on shapes left out wins: sixteen rows cannot
pay for everything.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from subquad_cost_model.bound import lower_bound_s
from subquad_cost_model.conformal import grouped_quantile
from subquad_cost_model.device import Device
from subquad_cost_model.estimator import Estimate, Estimator
from subquad_cost_model.features import Floats
from subquad_cost_model.gaussian_process import GaussianProcess, places_of
from subquad_cost_model.rows import CostRow
from subquad_cost_model.shape_groups import fold, shape_group
from subquad_cost_model.terms import HOST, SECONDS, Terms
from subquad_cost_model.timed_rows import TimedRow, timed

KINDS = ("none", "shift", "kernels", "overhead", "process")
"""From the simplest on: nothing; one factor; a factor per kernel; an overhead and a factor per kernel; a factor per
kernel and a Gaussian process."""
SHRINK = 1.0
"""So many rows of no deviation stand beside those of each kernel."""
PULL, OUTLIER = 0.3, 0.3
"""How firmly overhead and factor of a kernel are held near those of all kernels; log errors beyond the second count
by their size, not its square."""
MOST_FOLDS = 20
MOST_ROWS = 1000
"""Of one operator in a phase: a process of more takes minutes to be tried on all folds."""
LEAST_DOUBT = 0.08
"""Of a row, for the process: from shape to shape a source is off by more than repeats of a timing are, and sixteen rows
of a kernel are too few to follow that."""
LEAST_SHAPES = 5
"""With fewer shapes in a phase nothing can be left out to choose by, and the source stays as it is."""
REACH = 2.0
"""Beyond so many times the largest bound that was measured, or below as small a part of the smallest, the source's
interval counts as well."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """How the source is corrected in one phase. `kernels` hold (overhead in seconds, factor), `reach` the smallest and
    largest bound measured; `width` is half the interval of log seconds, infinite where shapes were too few.

    `errors` are the mean |log error| of each competitor on shapes left out, `rows` how many it was fitted to. `process`
    is None but for the kinds that have one.
    """

    kind: str
    weights: tuple[float, ...]
    kernels: Mapping[str, tuple[float, float]]
    reach: Mapping[str, tuple[float, float]]
    width: float
    errors: Mapping[str, float]
    rows: int
    process: GaussianProcess | None = None

    def seconds(self, asked: _Asked) -> Floats:
        """The corrected seconds of rows of its kernels."""
        fitted = _Fitted(np.array(self.weights), self.kernels, (0.0, 1.0), self.process)
        return np.asarray(np.exp(_predicted(fitted, asked)), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class CalibratedEstimator:
    """The source model, corrected on one device for the kernels that were measured there; elsewhere the source.

    `beside` are devices whose source estimates take part, after that for the device itself. `alike` are devices of its
    family that share its corrections: rows of all of them were measured.
    """

    source: Estimator
    device: Device
    corrections: Mapping[str, Correction]
    beside: tuple[Device, ...] = ()
    alike: tuple[Device, ...] = ()
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
        alike: Sequence[Device] = (),
        level: float = 0.9,
    ) -> CalibratedEstimator:
        """Choose and fit a correction for each phase that has shapes enough.

        Raises: ValueError when a row is of another device.
        """
        able = timed(rows)
        named = {one.name: one for one in (device, *alike)}
        strangers = {row.device.name for row in able} - set(named)
        if strangers:
            raise ValueError(f"rows of {', '.join(sorted(strangers))} say nothing about {device.name}")
        corrections: dict[str, Correction] = {}
        for phase in sorted({row.row.phase for row in able}):
            here = [row for row in able if row.row.phase == phase]
            if len({shape_group(row.row) for row in here}) >= LEAST_SHAPES:
                devices = [row.on(named[row.device.name]) for row in here]
                asked = _Asked.of([row.row for row in here], devices, source, beside)
                corrections[phase] = _chosen(here, asked, devices, level)
        return cls(
            source=source, device=device, corrections=corrections, beside=tuple(beside), alike=tuple(alike), level=level
        )

    def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        """One estimate per row, in order; its source is `model` where it was corrected, else what the source says."""
        before = self.source.predict(rows, device)
        if device.name not in (self.device.name, *(other.name for other in self.alike)):
            return [replace(estimate, note=f"calibrated for {self.device.name}, not here") for estimate in before]
        found = [
            replace(estimate, note=_join(estimate.note, "not among the kernels it was calibrated by"))
            for estimate in before
        ]
        for phase, correction in self.corrections.items():
            here = [i for i, row in enumerate(rows) if row.phase == phase and kernel_key(row) in correction.kernels]
            if not here:
                continue
            asked = _Asked.of([rows[i] for i in here], [device] * len(here), self.source, self.beside)
            for i, seconds in zip(here, correction.seconds(asked).tolist(), strict=True):
                found[i] = _estimate(rows[i], device, correction, seconds, before[i])
        return found


def kernel_key(row: CostRow) -> str:
    """The kernel with its operator."""
    return f"{row.operator}/{row.kernel}"


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _estimate(row: CostRow, device: Device, correction: Correction, seconds: float, before: Estimate) -> Estimate:
    """The corrected seconds in their interval, beyond what was measured in the source's as well."""
    smallest, largest = correction.reach[kernel_key(row)]
    bound_s = lower_bound_s(row, device)
    inside = smallest / REACH <= bound_s <= largest * REACH
    low_s, high_s = seconds * math.exp(-correction.width), seconds * math.exp(correction.width)
    if not inside or not math.isfinite(correction.width):
        low_s = min(before.low_s, seconds, low_s if math.isfinite(correction.width) else seconds)
        high_s = max(before.high_s, seconds, high_s if math.isfinite(correction.width) else seconds)
    note = "" if inside else f"its bound of {bound_s:.1e} s is beyond those it was calibrated by"
    return Estimate(
        seconds=seconds, low_s=low_s, high_s=high_s, peak_bytes=before.peak_bytes, source="model", note=note
    )


@dataclass(frozen=True)
class _Asked:
    """Rows of one phase, counted once: their kernels, log seconds of the source (a column for their device and each of
    those beside it), places, and what each term takes at the device's ceilings, but for the host's."""

    rows: Sequence[CostRow]
    kernels: NDArray[np.str_]
    log_source: Floats
    places: Floats
    parts: Floats

    @classmethod
    def of(
        cls, rows: Sequence[CostRow], devices: Sequence[Device], source: Estimator, beside: Sequence[Device]
    ) -> _Asked:
        """Ask the source, and count."""
        log_source = np.empty((len(rows), 1 + len(beside)))
        for (name, pace_s), device in {(device.name, device.host_s): device for device in devices}.items():
            here = [i for i, of_row in enumerate(devices) if (of_row.name, of_row.host_s) == (name, pace_s)]
            asked = [rows[i] for i in here]
            # What is captured waits for no host, on any of them.
            others = [replace(other, host_s=0.0) for other in beside] if device.host_s == 0.0 else beside
            columns = [[e.seconds for e in source.predict(asked, on)] for on in (device, *others)]
            log_source[here] = np.log(np.array(columns, dtype=np.float64).T)
        own = len(SECONDS) - len(HOST)
        parts = np.maximum(Terms.count(SECONDS, rows, devices).lines[:, :own], 0.0)
        return cls(rows, np.array([kernel_key(row) for row in rows]), log_source, places_of(rows, devices), parts)

    def take(self, inside: NDArray[np.bool_]) -> _Asked:
        """Those of some rows."""
        rows = [row for row, one in zip(self.rows, inside, strict=True) if one]
        return _Asked(rows, self.kernels[inside], self.log_source[inside], self.places[inside], self.parts[inside])


class _Fitted(NamedTuple):
    """Weights of the sources, overhead and factor by kernel, those of kernels not among the rows, and what is left."""

    weights: Floats
    of_kernels: Mapping[str, tuple[float, float]]
    shared: tuple[float, float]
    process: GaussianProcess | None = None


def _chosen(rows: Sequence[TimedRow], asked: _Asked, devices: Sequence[Device], level: float) -> Correction:
    """The correction that errs least on shapes left out, fitted to all rows, as wide as it erred there."""
    groups = [shape_group(row.row) for row in rows]
    log_s, doubts = np.log([row.seconds for row in rows]), np.array([row.doubt for row in rows])
    distinct = sorted(set(groups), key=lambda group: fold(group, 1 << 30))
    places = {group: place % MOST_FOLDS for place, group in enumerate(distinct)}
    folds = np.array([places[group] for group in groups])
    most = max(Counter(row.row.operator for row in rows).values())
    residuals: dict[str, Floats] = {}
    for kind in KINDS:
        if kind == "process" and most > MOST_ROWS:
            continue
        for stacked in (False, True) if asked.log_source.shape[1] > 1 and kind != "none" else (False,):
            found = np.empty_like(log_s)
            for number in np.unique(folds):
                out = folds == number
                fitted = _fitted(kind, stacked, asked.take(~out), log_s[~out], doubts[~out])
                found[out] = log_s[out] - _predicted(fitted, asked.take(out))
            residuals[f"stacked {kind}" if stacked else kind] = np.abs(found)
    errors = {name: float(residual.mean()) for name, residual in residuals.items()}
    best = min(errors, key=lambda name: errors[name])  # the simplest of equals
    kind, stacked = best.removeprefix("stacked "), best.startswith("stacked ")
    weights, of_kernels, shared, process = _fitted(kind, stacked, asked, log_s, doubts)
    bounds_s: dict[str, list[float]] = defaultdict(list)
    for row, device in zip(asked.rows, devices, strict=True):
        bounds_s[kernel_key(row)].append(lower_bound_s(row, device))
    return Correction(
        kind=best,
        weights=tuple(weights.tolist()),
        kernels={name: of_kernels.get(name, shared) for name in bounds_s},
        reach={name: (min(values), max(values)) for name, values in bounds_s.items()},
        width=grouped_quantile(residuals[best], groups, level),
        errors=errors,
        rows=len(rows),
        process=process,
    )


def _fitted(kind: str, stacked: bool, asked: _Asked, log_s: Floats, doubts: Floats) -> _Fitted:
    """Of one kind."""
    log_source, kernels = asked.log_source, asked.kernels
    weights = _weights(log_source, log_s) if stacked else np.eye(log_source.shape[1])[0]
    if kind == "none":
        return _Fitted(weights, {}, (0.0, 1.0))
    base = log_source @ weights
    shift = float(np.median(log_s - base))
    shared = (0.0, math.exp(shift))
    if kind == "shift":
        return _Fitted(weights, {}, shared)
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
    fitted = _Fitted(weights, of_kernels, shared)
    if kind != "process":
        return fitted
    left = log_s - _predicted(fitted, asked)
    unsure = np.maximum(doubts, LEAST_DOUBT)
    return fitted._replace(process=GaussianProcess.fit(asked.rows, asked.places, asked.parts, left, unsure))


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


def _predicted(fitted: _Fitted, asked: _Asked) -> Floats:
    """log seconds."""
    pairs = np.array([fitted.of_kernels.get(str(name), fitted.shared) for name in asked.kernels])
    found = np.log(pairs[:, 0] + pairs[:, 1] * np.exp(asked.log_source @ fitted.weights))
    if fitted.process is not None:
        found = found + fitted.process.predict(asked.rows, asked.places, asked.parts)
    return np.asarray(found, dtype=np.float64)
