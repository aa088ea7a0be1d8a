"""calibrate: correct the cost model by a few rows measured on this device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import yaml

from subquad.commands.key_help import keys_in_help
from subquad.commands.key_values import key_values
from subquad.commands.measure import check_names
from subquad.commands.table import table
from subquad.component_config import typed_config
from subquad.errors import ConfigError
from subquad.schema import CalibrateConfig

if TYPE_CHECKING:
    from subquad.compiler.calibrate import Calibration, Worth

HELP = """Measure a few shapes of every kernel on this device, and correct the cost model's estimates by them.

  python -m subquad calibrate budget_s=120

{keys}

The correction of each phase is the one, of several from none to an overhead and a factor per kernel, that errs least
on shapes left out. One shape in five is kept apart and judges the model before and after. The profile lies in the
user's cache and holds for this device under these versions; a second call goes on measuring where the first stopped."""


def run(arguments: list[str]) -> int:
    """Calibrate as `key=value` arguments say."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP.format(keys=keys_in_help(CalibrateConfig)))
        return 0
    request = calibrate_config(arguments)
    import pyarrow  # noqa: F401  (missing, it is said before minutes of measuring)

    from subquad.compiler.calibrate import calibrate_and_keep
    from subquad.compiler.target import require_local, resolve_target
    from subquad.registry import load_registry

    load_registry()  # fills the catalogue
    check_names("calibrate", operators=request.operators)
    target = require_local(resolve_target(request.target), request.target, verb="calibrate")
    print(as_text(calibrate_and_keep(target, request)))
    return 0


def as_text(done: Calibration) -> str:
    """The corrections, and what they are worth."""
    corrections = [
        (phase, c.kind, str(c.rows), f"{math.exp(c.errors['none']):.2f}", f"{math.exp(c.errors[c.kind]):.2f}")
        for phase, c in done.calibrated.corrections.items()
    ]
    header = ("phase", "correction", "rows", "off by a factor before", "after")
    worth = [
        (name, *_cells(of_it))
        for name, of_it in ((done.calibrated.source.name, done.before), ("calibrated", done.after))
        if of_it is not None
    ]
    title = f"Calibrated {done.calibrated.device.name} by {done.fitted} rows"
    if corrections:
        lines = [table(title, header, corrections)]
    else:
        lines = [f"{title}: no phase has enough shapes for a correction yet, and nothing changes; call it again\n"]
    if worth:
        lines.append(
            table("On shapes kept apart", ("model", "rows", "off by a factor", "in interval", "regret", "cells"), worth)
        )
    else:
        lines.append("No shape kept apart was measured, so nothing says what this is worth: use a larger budget_s.")
    again = "Calibrate it again when it is idle."
    lines += [f"The device seems to have been busy: {sign}. {again}" for sign in done.disturbed]
    lines.append(f"profile: {done.path or 'not kept, the cache cannot be written'}")
    return "\n".join(lines)


def _cells(worth: Worth) -> tuple[str, ...]:
    lost = "" if worth.regret is None else f"{worth.regret:.1%}"
    return str(worth.rows), f"{worth.error_factor:.2f}", f"{worth.covered:.0%}", lost, str(worth.cells)


def calibrate_config(arguments: list[str]) -> CalibrateConfig:
    """Read `key=value` arguments; values are YAML.  Raises: ConfigError."""
    values: dict[str, object] = {}
    for key, text in key_values("calibrate", CalibrateConfig, arguments).items():
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                what=f"'{text}' is not YAML: {str(error).splitlines()[0]}",
                where=f"calibrate.{key}",
                mend="write lists as [a, b], in quotes",
            ) from None
        if key == "operators" and isinstance(values[key], str):
            values[key] = [values[key]]
    request = typed_config(CalibrateConfig, values, where="calibrate")
    if request.budget_s <= 0:
        raise ConfigError(what=f"budget_s is {request.budget_s}", where="calibrate.budget_s", mend="use more than 0")
    return request
