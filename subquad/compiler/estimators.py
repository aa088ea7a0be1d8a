"""Which estimator answers for a target: the sources in the order of their trust, each falling back to the next.

    constant                                   every kernel costs the same
    roofline                                   bounds
    learned     profile -> fit -> roofline     `calibrate` writes profiles; fits abstain where they saw nothing
    measured    record -> profile -> fit -> roofline
"""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from pathlib import Path

from subquad.cache import user_cache
from subquad.compiler.options import CompileOptions
from subquad.compiler.target import Target
from subquad.compiler.workload import halved_rows
from subquad_cost_model import (
    ConstantEstimator,
    Device,
    Estimator,
    MeasuredEstimator,
    MeasurementStore,
    RooflineEstimator,
    learned_or_roofline,
    newest_fit,
    profile_or_source,
)

OWN_FIT = "operators"
"""The name under which fits to timings of our own kernels are shipped."""


def estimator_for(target: Target, options: CompileOptions, record: MeasurementStore | None = None) -> Estimator:
    """The estimator that `options` ask for on a target; `record` holds what was measured (None: the user's).

    A fit that is asked for and cannot be used costs one warning, and a note on every estimate.
    """
    if options.estimator == "roofline":
        return RooflineEstimator()
    record = measurement_record() if record is None else record
    if options.estimator == "constant":
        return ConstantEstimator.fit(record)
    if options.estimator == "learned":
        return _modelled(target, options)
    return MeasuredEstimator(record, _modelled(target, options))


def measurement_record() -> MeasurementStore:
    """What was measured on this machine so far; in memory alone where the cache cannot be written."""
    folder = user_cache("measurements")
    return MeasurementStore(None if folder is None else folder / "kernels.jsonl")


def own_fit(kind: str) -> Path | None:
    """The newest shipped fit to timings of our kernels on this kind of device; all so far are of CUDA devices."""
    return newest_fit(OWN_FIT) if kind == "cuda" else None


def profile_path(device: Device) -> Path | None:
    """The file of this device under its versions that `calibrate` writes; None where nothing can be cached."""
    folder = user_cache("profiles")
    words = [device.name, *(f"{name} {version}" for name, version in sorted(device.versions.items()))]
    return None if folder is None else folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', '-'.join(words))}.json"


def _modelled(target: Target, options: CompileOptions) -> Estimator:
    """What answers where nothing was measured: a profile of this very device stands before the fit that it corrects.

    A fit that the user names is taken as it is.
    """
    if options.fit is not None:
        return fitted(Path(options.fit).expanduser().absolute())
    folder = own_fit(target.kind)
    source: Estimator = RooflineEstimator() if folder is None else fitted(folder)
    path = None if target.local is None else profile_path(target.device)
    if path is not None and path.is_file():
        return profile_or_source(path, source, target.device)
    if folder is None and options.estimator == "learned":
        reason = "the learned model is not used: no fit of these kernels is shipped, and compiler.fit names none"
        warnings.warn(reason, stacklevel=3)
        return RooflineEstimator(name="roofline for learned", note=reason)
    return source


def fitted(folder: Path) -> Estimator:
    """The fit of a folder; the roofline, and one warning, where it cannot be used."""
    manifest = folder / "manifest.json"
    return _read(folder, manifest.stat().st_mtime_ns if manifest.is_file() else None)


@lru_cache(maxsize=4)
def _read(folder: Path, written_ns: int | None) -> Estimator:
    """The fit of a folder, read once for as long as it is not written anew."""
    return learned_or_roofline(folder, smaller=halved_rows)
