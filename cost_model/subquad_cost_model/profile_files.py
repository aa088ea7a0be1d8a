"""A device's calibration as one file of JSON, which holds what its source model said of a few rows, to know it by."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from subquad_cost_model.calibration import CalibratedEstimator, Correction
from subquad_cost_model.device import Device
from subquad_cost_model.estimator import Estimator
from subquad_cost_model.process_records import process_from_record, process_record
from subquad_cost_model.rows import CostRow

FORMAT_VERSION = 2
WITNESSES = 8
SAME = 1e-6
"""Relative difference of seconds below which two models say the same."""


class ProfileError(ValueError):
    """A file that holds no profile of this format, or one made for another device, versions or source model."""


def save_profile(
    path: Path, calibrated: CalibratedEstimator, rows: Sequence[CostRow], figures: Mapping[str, Any]
) -> None:
    """Write the profile all at once. `rows` are what it was fitted to, `figures` how it was judged."""
    witnesses = list(rows)[:: max(1, len(rows) // WITNESSES)][:WITNESSES]
    content = {
        "format_version": FORMAT_VERSION,
        "date": datetime.now(UTC).date().isoformat(),
        "device": json.loads(calibrated.device.to_json()),
        "beside": [json.loads(device.to_json()) for device in calibrated.beside],
        "alike": [json.loads(device.to_json()) for device in calibrated.alike],
        "level": calibrated.level,
        "source": calibrated.source.name,
        "witnesses": [
            {"row": asdict(row), "seconds": estimate.seconds}
            for row, estimate in zip(witnesses, calibrated.source.predict(witnesses, calibrated.device), strict=True)
        ],
        "corrections": {phase: _record(correction) for phase, correction in calibrated.corrections.items()},
        "figures": dict(figures),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def load_profile(path: Path, source: Estimator, device: Device | None = None) -> CalibratedEstimator:
    """Read a profile over the source model that it corrects, for `device` if one is given.

    Raises: ProfileError with what is wrong and what to do.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
    except FileNotFoundError:
        raise ProfileError(f"there is no profile at {path}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ProfileError(f"{path} is no profile ({type(error).__name__}: {error}): calibrate again") from None
    if version != FORMAT_VERSION:
        raise ProfileError(f"{path} has format version {version}; this package reads {FORMAT_VERSION}: calibrate again")
    try:
        made_for = Device.from_json(json.dumps(content["device"]))
        calibrated = CalibratedEstimator(
            source=source,
            device=made_for,
            corrections={phase: _correction(record) for phase, record in content["corrections"].items()},
            beside=tuple(Device.from_json(json.dumps(record)) for record in content["beside"]),
            alike=tuple(Device.from_json(json.dumps(record)) for record in content["alike"]),
            level=content["level"],
        )
        rows = [CostRow(**witness["row"]) for witness in content["witnesses"]]
        said = [float(witness["seconds"]) for witness in content["witnesses"]]
        source_name = content["source"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProfileError(f"{path} is no profile ({type(error).__name__}: {error}): calibrate again") from None
    if device is not None:
        if device.name != made_for.name:
            raise ProfileError(f"{path} was made for {made_for.name}, not for {device.name}: calibrate here")
        if dict(device.versions) != dict(made_for.versions):
            raise ProfileError(f"{path} was made under {_listed(made_for)}, not {_listed(device)}: calibrate again")
    if source.name != source_name:
        raise ProfileError(f"{path} corrects {source_name}, not {source.name}: calibrate again")
    now = [estimate.seconds for estimate in source.predict(rows, made_for)]
    if not np.allclose(now, said, rtol=SAME, atol=0):
        raise ProfileError(f"{path} corrects another {source_name}, which gave other seconds: calibrate again")
    return calibrated


def profile_or_source(path: Path, source: Estimator, device: Device | None = None) -> Estimator:
    """The calibrated model; where its file cannot be used, the source model, with a warning that says why."""
    try:
        return load_profile(path, source, device)
    except ProfileError as error:
        warnings.warn(f"{source.name} is used as it is: {error}", stacklevel=2)
        return source


def _listed(device: Device) -> str:
    return ", ".join(f"{name} {version}" for name, version in device.versions.items())


def _record(correction: Correction) -> dict[str, Any]:
    return asdict(replace(correction, process=None)) | {
        "width": correction.width if math.isfinite(correction.width) else None,
        "process": None if correction.process is None else process_record(correction.process),
    }


def _correction(record: Mapping[str, Any]) -> Correction:
    return Correction(
        kind=record["kind"],
        weights=tuple(record["weights"]),
        kernels={name: (overhead, factor) for name, (overhead, factor) in record["kernels"].items()},
        reach={name: (smallest, largest) for name, (smallest, largest) in record["reach"].items()},
        width=math.inf if record["width"] is None else record["width"],
        errors=record["errors"],
        rows=record["rows"],
        process=None if record["process"] is None else process_from_record(record["process"]),
    )
