"""Predict how long an operator takes on a device, with intervals: rows of numbers in, seconds and bytes out."""

from subquad_cost_model.bound import lower_bound_s
from subquad_cost_model.calibration import CalibratedEstimator
from subquad_cost_model.constant import ConstantEstimator
from subquad_cost_model.device import Device
from subquad_cost_model.devices import UnknownDeviceError, load_device, shipped_devices
from subquad_cost_model.estimator import Estimate, Estimator
from subquad_cost_model.fit_files import (
    FitError,
    learned_or_roofline,
    load_fit,
    newest_fit,
    save_fit,
    shipped_fit,
)
from subquad_cost_model.host_pace import HostPace
from subquad_cost_model.learned import LearnedEstimator
from subquad_cost_model.measure import Clock, Timing, time_callable, time_rivals
from subquad_cost_model.measured import MeasuredEstimator
from subquad_cost_model.measurements import Measurement, MeasurementStore
from subquad_cost_model.metrics import coverage, error_factor, regret
from subquad_cost_model.probe import probe_device
from subquad_cost_model.profile_files import ProfileError, load_profile, profile_or_source, save_profile
from subquad_cost_model.roofline import Efficiency, RooflineEstimator
from subquad_cost_model.rows import CostRow
from subquad_cost_model.timed_rows import TimedRow, TimedRowsError, read_timed_rows, timed, write_timed_rows
from subquad_cost_model.trees import Trees
from subquad_cost_model.undecided import Decision, decide

__all__ = [
    "CalibratedEstimator",
    "Clock",
    "ConstantEstimator",
    "CostRow",
    "Decision",
    "Device",
    "Efficiency",
    "Estimate",
    "Estimator",
    "FitError",
    "HostPace",
    "LearnedEstimator",
    "MeasuredEstimator",
    "Measurement",
    "MeasurementStore",
    "ProfileError",
    "RooflineEstimator",
    "TimedRow",
    "TimedRowsError",
    "Timing",
    "Trees",
    "UnknownDeviceError",
    "coverage",
    "decide",
    "error_factor",
    "learned_or_roofline",
    "load_device",
    "load_fit",
    "load_profile",
    "lower_bound_s",
    "newest_fit",
    "probe_device",
    "profile_or_source",
    "read_timed_rows",
    "regret",
    "save_fit",
    "save_profile",
    "shipped_devices",
    "shipped_fit",
    "time_callable",
    "time_rivals",
    "timed",
    "write_timed_rows",
]
