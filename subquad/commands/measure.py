"""measure: time kernels over a pool of shapes, into a table that cost models are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from subquad.commands.key_help import keys_in_help
from subquad.commands.key_values import key_values
from subquad.commands.table import table
from subquad.component_config import typed_config
from subquad.errors import ConfigError, NotFoundError, suggestion
from subquad.schema import MeasureConfig

HELP = """Time every kernel over a pool of shapes drawn from what the operators declare, for a stated time.

  python -m subquad measure budget_s=540 out=rows
  python -m subquad measure 'operators=[delta_rule]' budget_s=120
  python -m subquad_cost_model fit rows FIT        then fits a model to it

{keys}

Kernels are checked against the float64 reference before anything is timed, once per layout; what fails is a row
without seconds. Forward and backward are of the kernel alone, each call with a cold cache (CUDA); a decode is one
of 20 in a CUDA graph. Run it again with the same folder and it goes on with what is missing."""
STATUSES = ("ok", "oom", "unsupported", "wrong")


def run(arguments: list[str]) -> int:
    """Measure what `key=value` arguments say."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP.format(keys=keys_in_help(MeasureConfig)))
        return 0
    request = measure_config(arguments)
    import pyarrow  # noqa: F401  (missing, it is said before minutes of measuring)

    from subquad.compiler.sample_kernels import Plan, SampleRun, by_kernel
    from subquad.compiler.shape_pool import KINDS
    from subquad.compiler.target import require_local, resolve_target
    from subquad.registry import load_registry

    load_registry()  # fills the catalogue
    check_names("measure", operators=request.operators, kernels=request.kernels)
    for kind in request.kinds:
        if kind not in KINDS:
            raise NotFoundError(
                what=f"no kind of workload is called '{kind}'", where="measure.kinds", mend=f"use {', '.join(KINDS)}"
            )
    target = require_local(resolve_target(request.target), request.target, verb="measure")
    plan = Plan(
        operators=tuple(request.operators),
        kernels=tuple(request.kernels),
        kinds=tuple(request.kinds),
        layouts=request.layouts,
        shapes=request.shapes,
        seed=request.seed,
        doubts=request.doubts,
    )
    folder = Path(request.out)
    sampling = SampleRun(target, folder, plan, budget_s=request.budget_s)
    new = sampling.run()
    spent, slow = sampling.spent(), sampling.too_slow()
    lines = [
        [name, *(counts[status] or "" for status in STATUSES), f"{spent.get(name, 0):.0f}", slow.get(name, "")]
        for name, counts in sorted(by_kernel(new).items())
    ]
    print(
        table(
            f"Rows of {target.device.name}",
            ("kernel", *STATUSES, "seconds", "too slow"),
            [[str(cell) for cell in line] for line in lines],
        )
    )
    print(f"{sum(row.status == 'ok' for row in new)} new timings in {folder}, {len(sampling.rows)} rows of this device")
    return 0


def measure_config(arguments: list[str]) -> MeasureConfig:
    """Read `key=value` arguments; values are YAML.  Raises: ConfigError."""
    values: dict[str, object] = {}
    for key, text in key_values("measure", MeasureConfig, arguments).items():
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                what=f"'{text}' is not YAML: {str(error).splitlines()[0]}",
                where=f"measure.{key}",
                mend="write lists as [a, b], in quotes",
            ) from None
        if key in ("operators", "kernels", "kinds") and isinstance(values[key], str):
            values[key] = [values[key]]
    request = typed_config(MeasureConfig, values, where="measure")
    for key, value in (("budget_s", request.budget_s), ("layouts", request.layouts), ("shapes", request.shapes)):
        if value <= 0:
            raise ConfigError(what=f"{key} is {value}", where=f"measure.{key}", mend="use more than 0")
    return request


def check_names(verb: str, **named: Sequence[str]) -> None:
    """Refuse names that no operator, or no kernel, has.  Raises: NotFoundError."""
    from subquad_kernels.catalogue import CATALOGUE

    operators = [operator.name for operator in CATALOGUE]
    kernels = [kernel for name in operators for kernel in CATALOGUE.kernels(name)]
    known = {"operators": operators, "kernels": [name for kernel in kernels for name in (kernel.name, kernel.key)]}
    for key, names in named.items():
        for name in names:
            if name not in known[key]:
                raise NotFoundError(
                    what=f"no {key[:-1]} is called '{name}'",
                    where=f"{verb}.{key}",
                    mend=f"{suggestion(name, known[key])}`python -m subquad plugins` lists them",
                )
