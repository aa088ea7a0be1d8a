"""bench: time every kernel of an operator as lengths grow, beside the least time that the device allows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from subquad.commands.key_values import key_values, keys_with_defaults
from subquad.commands.table import table
from subquad.component_config import typed_config
from subquad.errors import ConfigError
from subquad.schema import BenchConfig

if TYPE_CHECKING:
    from subquad.compiler.bench import Case, Row

HELP = """Time every kernel of an operator as lengths grow, and check it against the float64 reference.

  python -m subquad bench operator=segment_attention
  python -m subquad bench operator=selective_scan 'shapes=[{{t: 4096}}, {{t: 8192, documents: 4}}]' plot=true

{keys}

forward, both   milliseconds of the kernel alone, forward and forward + backward: on CUDA by the device's own events,
                each call with a cold cache, median of five rounds in which rivals take turns
spread          half of slowest minus fastest round, over the median: trust no difference below it
called          milliseconds on the wall of a forward and backward through the operator and autograd
x floor, x best both, over the bound of the counted work on this device, and over the fastest kernel
peak            what that call needs beyond its inputs (CUDA)
error           the largest of the self-check: outputs and gradients against the float64 reference"""
HEADER = ("kernel", "forward", "both", "spread", "called", "x floor", "x best", "peak MiB", "error", "")


def run(arguments: list[str]) -> int:
    """Measure what `key=value` arguments say."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP.format(keys=keys_with_defaults(BenchConfig)))
        return 0
    request = bench_config(arguments)
    if request.plot:
        import matplotlib  # noqa: F401  (missing, it is said before minutes of measuring)
    from subquad.compiler.bench import Bench

    bench = Bench(request)
    print(f"{bench.operator.name} on {bench.target.device.name}, times in ms", flush=True)
    cases = []
    for case in bench.cases():
        cases.append(case)
        print(as_text(case), flush=True)
    if request.plot:
        from subquad.compiler.bench_plot import draw

        path = Path(f"bench-{bench.operator.name}.png").absolute()
        draw(cases, bench.target.device.name, path)
        print(f"plot: {path}")
    print(f"measurements: {bench.record or 'not kept, the cache cannot be written'}")
    return 0


def bench_config(arguments: list[str]) -> BenchConfig:
    """Read `key=value` arguments; values are YAML.  Raises: ConfigError."""
    values: dict[str, object] = {}
    for key, text in key_values("bench", BenchConfig, arguments).items():
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                what=f"'{text}' is not YAML: {str(error).splitlines()[0]}",
                where=f"bench.{key}",
                mend="write lists as [a, b] and shapes as [{t: 1024}], in quotes",
            ) from None
    if not values.get("operator"):
        raise ConfigError(
            what="no operator is named",
            where="bench.operator",
            mend="name one: bench operator=NAME; `python -m subquad plugins` lists them",
        )
    if isinstance(values.get("kernels"), str):
        values["kernels"] = [values["kernels"]]
    return typed_config(BenchConfig, values, where="bench")


def as_text(case: Case) -> str:
    """The table of one length; kernels that were left out say why."""
    workload = case.workload
    pairs = " ".join(f"{name}={value}" for name, value in [*workload.shape.items(), *workload.options.items()])
    title = f"{pairs}   {workload.dtype}   floor {_milliseconds(case.floor_s)}"
    return table(title, HEADER, [_cells(row, case) for row in case.rows])


def _cells(row: Row, case: Case) -> list[str]:
    error = "" if row.error is None else f"{row.error:.1e}"
    if row.why_not is not None:
        return [row.kernel, *[""] * 7, error, row.why_not]
    times = [_milliseconds(row.forward_s), _milliseconds(row.both_s), f"{row.spread:.0%}", _milliseconds(row.called_s)]
    ratios = [_number(row.both_s / case.floor_s, 1), _number(row.both_s / case.best_s, 2)]
    peak = f"{row.peak_bytes / 2**20:.1f}" if row.peak_bytes else ""
    return [row.kernel, *times, *ratios, peak, error, ""]


def _milliseconds(seconds: float) -> str:
    return _number(seconds * 1e3, 3 if seconds < 0.1 else 1)


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
