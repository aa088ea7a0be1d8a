"""bench: time every kernel of an operator as lengths grow, or decoding with whole models as their context does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from subquad.commands.key_help import keys_in_help
from subquad.commands.key_values import key_values
from subquad.commands.table import table
from subquad.component_config import defaults_of, typed_config
from subquad.compose import load_config
from subquad.errors import ConfigError
from subquad.schema import BenchConfig, DecodingBenchConfig

if TYPE_CHECKING:
    from subquad.compiler.bench import Case, Row
    from subquad.training.bench_decoding import DecodingRow

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
error           the largest of the self-check: outputs and gradients against the float64 reference

Or time models that decode, behind contexts of growing length, into a record and a picture.

  python -m subquad bench models=[scout_mamba,scout_swa,transformer,mamba] contexts=[1024,4096,16384] plot=true

{decoding_keys}"""
HEADER = ("kernel", "forward", "both", "spread", "called", "x floor", "x best", "peak MiB", "error", "")


def run(arguments: list[str]) -> int:
    """Measure what `key=value` arguments say."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP.format(keys=keys_in_help(BenchConfig), decoding_keys=keys_in_help(DecodingBenchConfig)))
        return 0
    if any(argument.startswith("models=") for argument in arguments):
        return run_decoding(typed_config(DecodingBenchConfig, _values(DecodingBenchConfig, arguments), where="bench"))
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
    values = _values(BenchConfig, arguments)
    if not values.get("operator"):
        raise ConfigError(
            what="no operator is named",
            where="bench.operator",
            mend="name one: bench operator=NAME; `python -m subquad plugins` lists them",
        )
    return typed_config(BenchConfig, values, where="bench")


def run_decoding(request: DecodingBenchConfig) -> int:
    """Measure recipes that decode."""
    if request.plot:
        import matplotlib  # noqa: F401  (as above)
    if not request.models:
        raise ConfigError(what="no model is named", where="bench.models", mend="name recipes: models=[mamba]")
    configs = [
        load_config([f"model={name}", "compiler.measure=false", "calibrate=never", *request.overrides])
        for name in request.models
    ]
    if any(config.plan is not None for config in configs):
        raise ConfigError(
            what="a plan names the kernels of training, and a decode is no part of it",
            where="bench.overrides",
            mend="leave plan out; overrides=[kernel.OPERATOR=NAME] pins a kernel",
        )
    from subquad.compiler.report import decoded_by
    from subquad.training.bench_decoding import bench_decoding
    from subquad.training.compilation import device_of

    device = device_of(configs[0])
    print(f"decoding on {device} in {request.dtype}, batch after batch, contexts growing", flush=True)
    rows = []
    for row in bench_decoding(configs, request):
        rows.append(row)
        print(decoding_line(row), flush=True)
    for line in dict.fromkeys(f"{row.model}: {decoded_by(row.kernels)}" for row in rows if row.kernels):
        print(line)
    path = Path(request.out).absolute()
    print(f"record: {path}")
    if request.plot:
        from subquad.training.decoding_plot import draw_decoding

        picture = path.with_suffix(".png")
        draw_decoding(rows, f"{request.dtype}, {device}", picture)
        print(f"plot: {picture}")
    return 0


def decoding_line(row: DecodingRow) -> str:
    """A row as it comes."""
    head = f"{row.model:<18} batch {row.batch_size:<3} context {row.context:>7,}"
    if row.why_not is not None or row.tokens_per_s is None:
        return f"{head}  left out: {row.why_not}"
    peak = "" if row.peak_bytes is None else f", peak {row.peak_bytes / 2**30:.2f} GiB"
    rate = f"{row.tokens_per_s:>10,.1f} tokens/s ({row.spread:.0%})"
    replayed = ", ".join(f"{count} {name}" for name, count in row.graph_layers.items())
    graphs = f", {row.graphs} graphs of {replayed}" if row.graphs else ""
    return f"{head}  {rate}, carry {row.carry_bytes / 2**20:,.2f} MiB a sequence{peak}{graphs}"


def _values(config_class: type, arguments: list[str]) -> dict[str, object]:
    """The arguments as YAML; one value where a list belongs is a list of it.  Raises: ConfigError."""
    lists = [name for name, default in defaults_of(config_class).items() if isinstance(default, list)]
    values: dict[str, object] = {}
    for key, text in key_values("bench", config_class, arguments).items():
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                what=f"'{text}' is not YAML: {str(error).splitlines()[0]}",
                where=f"bench.{key}",
                mend="write lists as [a, b] and shapes as [{t: 1024}], in quotes; what holds brackets itself in quotes"
                " of its own: 'overrides=[\"deny=[a]\"]'",
            ) from None
        if key in lists and not isinstance(values[key], list):
            values[key] = [values[key]]
    return values


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
