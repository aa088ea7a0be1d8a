"""A run meets a device that the cost model knows nothing of: a line says so, or it is calibrated before all else.

offer    one line on stderr says what `calibrate` would do, once a process
auto     the calibration runs, for `compiler.calibrate_budget_s`; its profile stands before the fit from then on
never    nothing
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from subquad.compiler.estimators import fitted, own_fit
from subquad.compiler.options import CompileOptions
from subquad.compiler.profile import profile_path
from subquad.compiler.target import Target
from subquad.errors import ConfigError, suggestion
from subquad.log import say
from subquad.schema import CalibrateConfig, RunConfig
from subquad_cost_model import LearnedEstimator

WAYS = ("offer", "auto", "never")


def know_device(target: Target, config: RunConfig) -> None:
    """Offer to calibrate a device that is at hand and unknown, or calibrate it, as the run asks.

    Raises: ConfigError when it asks for something else.
    """
    if config.calibrate not in WAYS:
        raise ConfigError(
            what=f"calibrate is '{config.calibrate}'",
            where="calibrate",
            mend=f"{suggestion(config.calibrate, WAYS)}there are {', '.join(WAYS)}",
        )
    if config.compiler.calibrate_budget_s <= 0:
        raise ConfigError(
            what=f"calibrate_budget_s is {config.compiler.calibrate_budget_s}",
            where="compiler.calibrate_budget_s",
            mend="use a number above 0, or calibrate=never",
        )
    if config.calibrate == "never" or is_known(target, CompileOptions.of_run(config)):
        return
    if config.calibrate == "offer":
        _offer(target.device.name, config.compiler.calibrate_budget_s)
        return
    from subquad.compiler.calibrate import calibrate_and_keep

    say(f"{target.device.name} is new to the cost model: calibrating (calibrate=auto)")
    done = calibrate_and_keep(target, CalibrateConfig(budget_s=config.compiler.calibrate_budget_s))
    if done.before is not None and done.after is not None:
        factors = f"off by a factor of {done.before.error_factor:.2f} before, {done.after.error_factor:.2f} after"
        say(f"calibrated by {done.fitted} rows: {factors}, on shapes kept apart")


def is_known(target: Target, options: CompileOptions) -> bool:
    """Whether estimates for this device rest on timings of it, or nobody asks for such: another estimator, a fit of the
    user's own, or a device that is not here."""
    if target.local is None or options.fit is not None or options.estimator not in ("measured", "learned"):
        return True
    path = profile_path(target.device)
    if path is not None and path.is_file():
        return True
    folder = own_fit(target.kind)
    return folder is not None and target.device.name in _devices_of(folder)


def _devices_of(folder: Path) -> frozenset[str]:
    model = fitted(folder)
    if not isinstance(model, LearnedEstimator):
        return frozenset()
    return frozenset(name for head in model.heads.values() for name in head.devices)


@lru_cache(maxsize=8)
def _offer(name: str, budget_s: float) -> None:
    say(
        f"{name} is new to the cost model: `python -m subquad calibrate budget_s={budget_s:.0f}` corrects it, "
        "calibrate=auto does so before a run, calibrate=never says nothing"
    )
