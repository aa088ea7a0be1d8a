"""Calibrating the cost model to this device: a few rows of every kernel, a correction, and what it is worth."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from subquad.cache import user_cache
from subquad.compiler.estimators import own_fit
from subquad.compiler.profile import profile_path
from subquad.compiler.sample_kernels import Plan, SampleRun
from subquad.compiler.target import Target, is_same_model
from subquad.compiler.workload import halved_rows
from subquad.errors import ConfigError
from subquad.schema import CalibrateConfig
from subquad_cost_model import (
    CalibratedEstimator,
    Device,
    Estimator,
    FitError,
    LearnedEstimator,
    RooflineEstimator,
    TimedRow,
    error_factor,
    load_device,
    load_fit,
    regret,
    save_profile,
    shipped_devices,
    timed,
)
from subquad_cost_model.evaluate import estimates_of
from subquad_cost_model.metrics import coverage
from subquad_cost_model.shape_groups import is_held_out, shape_group

FAR_APART, OFTEN = 0.1, 0.25
"""Where more of the repeated timings lie further apart than the first, other work ran: of the eleven records of an H100
and of H200 (`cost_model/data`) 2 to 21 % do."""
LEAST_CEILING = 0.7
"""Of its data sheet: the probes of those records reached 0.86 to 0.91 of memory and of products in half precision."""
LAYOUTS, SHAPES = 4, 32
"""Of each operator and of each layout: few layouts, as each is checked and compiled."""


@dataclass(frozen=True, kw_only=True)
class Worth:
    """How an estimator does on rows that it did not see: mean regret of its choices over `cells` with rivals, error as
    a factor, and the share of rows inside its intervals."""

    rows: int
    cells: int
    regret: float | None
    error_factor: float
    covered: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was found out; `before` and `after` are None where no held-out shape was measured.

    `disturbed` says by what the device seems to have been busy with other work, which a profile of it would hold for
    its own.
    """

    calibrated: CalibratedEstimator
    fitted: int
    before: Worth | None
    after: Worth | None
    path: Path | None
    disturbed: tuple[str, ...] = ()


def source_model(fit: str, kind: str) -> tuple[Estimator, tuple[Device, ...]]:
    """The model to correct, and the shipped devices of this kind that it was fitted to.

    `auto` is what the host asks without a calibration: the newest fit to our kernels on this kind of device, or the
    roofline where none is shipped. Raises: ConfigError.
    """
    folder = own_fit(kind) if fit == "auto" else None if fit == "roofline" else Path(fit).expanduser().absolute()
    if folder is None:
        return RooflineEstimator(), ()
    try:
        learned = replace(load_fit(folder), smaller=halved_rows)
    except (FitError, ModuleNotFoundError) as error:
        raise ConfigError(what=str(error), where="calibrate.fit", mend="fit=roofline corrects the bound") from None
    return learned, _devices_of(learned, kind)


def calibrate(
    target: Target, source: Estimator, beside: Sequence[Device], folder: Path, *, budget_s: float,
    operators: Sequence[str] = (), seed: int = 0,
) -> Calibration:  # fmt: skip
    """Measure for `budget_s`, correct the source by what is not held out, judge both by what is, keep the profile.

    Rows of earlier calibrations in the folder are used as well; a second one goes on where the first stopped.
    """
    plan = Plan(operators=tuple(operators), layouts=LAYOUTS, shapes=SHAPES, seed=seed)
    sampling = SampleRun(target, folder, plan, budget_s=budget_s, source="subquad calibrate")
    sampling.run()
    rows = timed(sampling.rows)
    fitted = [row for row in rows if not is_held_out(row.row)]
    judged = [row for row in rows if is_held_out(row.row)]
    calibrated = CalibratedEstimator.fit(fitted, target.device, source, beside=beside)
    before, after = (worth(estimator, judged) if judged else None for estimator in (source, calibrated))
    path = profile_path(target.device)
    if path is not None:
        figures = {"before": before and asdict(before), "after": after and asdict(after)}
        save_profile(path, calibrated, [row.row for row in fitted], figures)
    return Calibration(
        calibrated=calibrated, fitted=len(fitted), before=before, after=after, path=path,
        disturbed=disturbances(target.device, rows),
    )  # fmt: skip


def disturbances(device: Device, rows: Sequence[TimedRow]) -> tuple[str, ...]:
    """Signs that other work ran beside these timings, which no model was asked for.

    Repeats of one timing differ, or the probe reached far less than the data sheet of a device of this model.
    """
    found = []
    repeated = [row for row in rows if (row.repeats or 0) > 1]
    apart = sum(2 * row.doubt > FAR_APART for row in repeated)
    if apart > OFTEN * len(repeated):
        found.append(f"repeats of {apart} of {len(repeated)} timings lie more than {FAR_APART:.0%} apart")
    if device.origin == "probed":
        sheets = [sheet for sheet in map(load_device, shipped_devices()) if is_same_model(sheet.name, device.name)]
        for sheet in sheets[:1]:
            share = device.bytes_per_s / sheet.bytes_per_s
            if share < LEAST_CEILING:
                found.append(f"the probe reached {share:.0%} of the memory's stated bandwidth")
            rates = sheet.matmul_flops_per_s.get("bfloat16"), device.matmul_flops_per_s.get("bfloat16")
            if rates[0] and rates[1] and rates[1] / rates[0] < LEAST_CEILING:
                found.append(f"the probe reached {rates[1] / rates[0]:.0%} of the stated products in bfloat16")
    return tuple(found)


def calibrate_and_keep(target: Target, request: CalibrateConfig) -> Calibration:
    """Calibrate as asked, by rows in the user's cache that a later call goes on with.  Raises: ConfigError."""
    source, beside = source_model(request.fit, target.kind)
    cache = user_cache("calibration")
    with tempfile.TemporaryDirectory() as temporary:
        return calibrate(
            target, source, beside, cache or Path(temporary),
            budget_s=request.budget_s, operators=request.operators, seed=request.seed,
        )  # fmt: skip


def worth(estimator: Estimator, rows: Sequence[TimedRow]) -> Worth:
    """Judge an estimator by timed rows of one device."""
    estimates = estimates_of(estimator, rows)
    measured_s = [row.seconds for row in rows]
    cells: dict[tuple[str, ...], dict[str, tuple[float, float]]] = defaultdict(dict)
    for row, estimate in zip(rows, estimates, strict=True):
        key = shape_group(row.row), row.row.phase, row.row.dtype
        cells[key][row.row.kernel] = estimate.seconds, row.seconds
    lost = [_lost(rivals) for rivals in cells.values() if len(rivals) > 1]
    return Worth(
        rows=len(rows),
        cells=len(lost),
        regret=sum(lost) / len(lost) if lost else None,
        error_factor=error_factor([estimate.seconds for estimate in estimates], measured_s),
        covered=coverage(estimates, measured_s),
    )


def _lost(rivals: Mapping[str, tuple[float, float]]) -> float:
    chosen = min(rivals, key=lambda name: rivals[name][0])
    return regret(chosen, {name: measured_s for name, (_, measured_s) in rivals.items()})


def _devices_of(learned: LearnedEstimator, kind: str) -> tuple[Device, ...]:
    names = {name for head in learned.heads.values() for name in head.devices}
    return tuple(
        device for device in map(load_device, shipped_devices()) if device.name in names and device.kind == kind
    )
