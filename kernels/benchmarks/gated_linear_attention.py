"""Check and time gated linear attention on a CUDA device, beside other libraries where they are installed.

    python kernels/benchmarks/gated_linear_attention.py OUT.json [--tune] [--only NAME ...] [--limit-s 240]

bfloat16. `device_ms` is the sum of the times of all kernels that one call starts (profiler, mean of ten calls);
`called_ms` is what a caller waits for: through the torch op, with autograd where gradients are wanted (median of
`triton.testing.do_bench`, L2 cleared between calls); `host_us` is what a call of a tiny shape takes before it returns.
`error` is the largest of outputs and gradients of the same widths at 2 x 299 tokens, against float64.
Cases are of GLA's decays but for the "violent" one, 16 times as strong: fewer tokens then share one product.
With --tune, launches are tried for each case, one kernel after the other and then the length of a stretch, and the best
are printed and kept for the timings; the package itself keeps what `fused.launch_of` says.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Limit, Record, Timed, device_parts, distance, host_us, show_parts, surviving
from torch import Tensor

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.gated_linear_attention import fused
from subquad_kernels.gated_linear_attention.definition import sample_inputs
from subquad_kernels.operators import gated_linear_attention
from subquad_kernels.self_check import judge, kernel_errors
from subquad_kernels.workload import Workload

OPERATOR = CATALOGUE.operator("gated_linear_attention")
Call = Callable[[dict[str, Any]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape that is timed; read="before" is RWKV-6, with a bonus."""

    name: str
    b: int
    t: int
    h: int = 16
    n: int = 64
    p: int = 64
    read: str = "after"
    decay_dtype: str = "float32"
    documents: int = 0
    decay: float = 1.0

    def workload(self, *, state: bool = False, **changes: int) -> Workload:
        shape = {axis: getattr(self, axis) for axis in ("b", "t", "h", "n", "p")} | changes
        if self.documents:
            shape["documents"] = self.documents
        options: dict[str, Any] = {"read": self.read, "bonus": self.read == "before", "initial_state": state}
        options["decay_dtype"] = self.decay_dtype
        return Workload(
            operator="gated_linear_attention", shape=shape, dtype="bfloat16", phase="backward", options=options
        )

    def inputs(self, *, state: bool = False, **changes: int) -> dict[str, Any]:
        found: dict[str, Any] = sample_inputs(self.workload(state=state, **changes), seed=0, device="cuda")
        return found | {"log_decay": found["log_decay"] * self.decay}


CASES = (
    Case(name="D64 L2k", b=16, t=2_048),
    Case(name="D64 L8k", b=4, t=8_192),
    Case(name="D64 L32k", b=1, t=32_768),
    Case(name="D64 L8k bf16 decay", b=4, t=8_192, decay_dtype="bfloat16"),
    Case(name="D64 L8k packed", b=1, t=32_768, documents=24),
    Case(name="RWKV-6 L8k", b=4, t=8_192, read="before"),
    Case(name="D64 L8k violent", b=4, t=8_192, decay=16.0),
    Case(name="D128 L8k", b=4, t=8_192, n=128, p=128),
)


def ours(inputs: dict[str, Any]) -> Tensor:
    return gated_linear_attention(**inputs, kernel="fused")[0]


def launched(launch: fused.Launch) -> Any:
    """The kernel with its functions bound to a launch."""

    class Bound:
        forward = staticmethod(partial(fused.forward, launch))
        backward = staticmethod(partial(fused.backward, launch=launch))

    kernel = replace(CATALOGUE.kernel("gated_linear_attention", "fused"))
    kernel.__dict__["torch_half"] = Bound
    return kernel


def default_launch(case: Case) -> fused.Launch:
    return fused.launch_of(case.n, case.p, torch.bfloat16)


def check(case: Case, launch: fused.Launch) -> tuple[float, str, bool]:
    """The largest error at the case's widths and a small size, its name, and whether all are within tolerance."""
    arguments = case.inputs(state=True, b=1 if case.documents else 2, t=299, h=min(case.h, 4))
    # Cut into two stretches, as the timed shapes are.
    kernel = launched(replace(launch, stretch=256))
    errors = kernel_errors(OPERATOR, kernel, arguments, gradients=True)
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name, judge(OPERATOR, kernel, case.workload(), errors).passed


def time_case(record: Record, case: Case, launch: fused.Launch | None = None) -> None:
    """Defaults are timed through the torch op; launches that were asked for are timed as kernels alone."""
    row: dict[str, Any] = {"case": asdict(case), "tuned": launch is not None}
    with surviving(row):
        row["error"], row["error_of"], row["passed"] = check(case, launch or default_launch(case))
        inputs = case.inputs()
        if launch is None:
            row |= Timed(ours, inputs).times()
        else:
            row |= kernel_times(inputs, launch)
        floor = OPERATOR.work(case.workload()), OPERATOR.work(replace(case.workload(), phase="forward"))
        row["bytes"] = {"forward": floor[1].bytes_moved, "both": floor[0].bytes_moved + floor[1].bytes_moved}
        state = "ok  " if row["passed"] else "FAIL"
        print(f"{state} {case.name:16} error {row['error']:.1e} ({row['error_of']})", end="")
        for name, size in row["bytes"].items():
            gigabytes = size / row[f"{name}_device_ms"] / 1e6
            print(f"   {name} device {row[f'{name}_device_ms']:.3f} ({gigabytes:.0f} GB/s)", end="")
            print(f" called {row[f'{name}_called_ms']:.3f}" if f"{name}_called_ms" in row else "", end="")
        print(flush=True)
        show_parts(row["both_parts"])
    if "failure" in row:
        print("FAIL", case.name, row["failure"], flush=True)
    record.add("timings", row)


def kernel_times(inputs: dict[str, Any], launch: fused.Launch) -> dict[str, Any]:
    pull = torch.randn_like(inputs["v"])

    def forward() -> tuple[Tensor, ...]:
        return fused.forward(launch, **inputs)

    def both() -> None:
        fused.backward(inputs, forward(), (pull, None), launch)

    found: dict[str, Any] = {}
    for name, function in (("forward", forward), ("both", both)):
        parts = device_parts(function)
        found |= {f"{name}_device_ms": sum(parts.values()), f"{name}_parts": parts}
    return found


def time_host(record: Record) -> None:
    """Microseconds until a call returns, of a shape that the device finishes sooner."""
    timed = Timed(ours, Case(name="tiny", b=1, t=1_024, h=2).inputs())
    functions = {
        "forward": lambda: fused.forward(**timed.inputs), "op forward": timed.forward,
        "op forward+backward": timed.both,
    }  # fmt: skip
    row = {name: host_us(function) for name, function in functions.items()}
    print("host us a call:", {name: round(value, 1) for name, value in row.items()}, flush=True)
    record.add("host_us", row)


def _fla_gla(case: Case) -> Call | None:
    call = importlib.import_module("fla.ops.gla").chunk_gla
    plain = case.read == "after" and not case.documents
    return (lambda x: call(x["q"], x["k"], x["v"], g=x["log_decay"])[0]) if plain else None


def _fla_rwkv6(case: Case) -> Call | None:
    call = importlib.import_module("fla.ops.rwkv6").chunk_rwkv6
    plain = case.read == "before" and not case.documents
    return (lambda x: call(x["q"], x["k"], x["v"], x["log_decay"], x["bonus"], scale=x["scale"])[0]) if plain else None


RIVALS: dict[str, Callable[[Case], Call | None]] = {"fla chunk_gla": _fla_gla, "fla chunk_rwkv6": _fla_rwkv6}


def time_rivals(record: Record, cases: tuple[Case, ...], over: Callable[[], bool]) -> None:
    """Their first calls tune for a minute and more; what is not installed or raises is named."""
    for (name, make), case in itertools.product(RIVALS.items(), cases):
        row: dict[str, Any] = {"rival": name, "case": case.name}
        if over():
            row["failure"] = "time is up"
        else:
            with surviving(row):
                call = make(case)
                if call is None:
                    continue
                timed = Timed(call, case.inputs())
                row["distance"] = distance(timed.forward(), ours(timed.inputs))
                row |= timed.times()
        shown = {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}
        print(f"rival {name:36} {case.name:16}", shown, row.get("failure", "")[:90], flush=True)
        record.add("rivals", row)


def candidates(base: fused.Tiles, case: Case) -> Iterator[fused.Tiles]:
    """Widths of tiles, warps, stages of loads; the one that stands comes first."""
    yield base
    for width, warps, stages in itertools.product((64, 32, 16), (4, 8), (1, 2)):
        tiles = fused.Tiles(width=width, num_warps=warps, num_stages=stages)
        if width <= max(16, case.n, case.p) and tiles != base:
            yield tiles


def tune(record: Record, case: Case, over: Callable[[], bool]) -> fused.Launch:
    """The launch with the least device time, one kernel's tiles after the other's, then tokens a stretch."""
    inputs = case.inputs()
    pull = torch.randn_like(inputs["v"])
    launch = default_launch(case)
    expected = fused.forward(**inputs)[0]

    def measure(trial: fused.Launch, directions: tuple[str, ...], label: str) -> float:
        """Milliseconds of a direction, or of both; infinite where it raises or its result is another."""
        row: dict[str, Any] = {"case": case.name, "directions": directions, "launch": asdict(trial)}
        with surviving(row):
            outputs = fused.forward(trial, **inputs)
            apart = distance(outputs[0], expected)
            functions: dict[str, Callable[[], object]] = {
                "forward": lambda: fused.forward(trial, **inputs),
                "backward": lambda: fused.backward(inputs, outputs, (pull, None), trial),
            }
            times = {name: device_parts(functions[name]) for name in directions}
            row |= {"distance": apart, "parts": times, "ms": sum(sum(parts.values()) for parts in times.values())}
        record.add("tuning", row)
        print(f"  {label:80} {row.get('ms', 0):.3f} {row.get('failure', '')[:80]}", flush=True)
        return float(row["ms"]) if row.get("distance", 1.0) < 0.05 else float("inf")

    def best_of(trials: Iterator[tuple[fused.Launch, str]], directions: tuple[str, ...]) -> fused.Launch:
        best, least = launch, float("inf")
        for trial, label in trials:
            if over():
                print("time is up: the rest is not tuned")
                break
            milliseconds = measure(trial, directions, label)
            if milliseconds < least:
                best, least = trial, milliseconds
        return best

    kernels = (("read", "forward"), ("differentiate", "backward"), ("summarise", "forward"))
    if case.decay > 1.0:
        kernels = (("violent", "forward"), ("violent", "backward"))
    for kernel, direction in kernels:
        tried = candidates(getattr(launch, kernel), case)
        trials = ((replace(launch, **{kernel: tiles}), f"{kernel} {direction} {tiles}") for tiles in tried)
        launch = best_of(trials, (direction,))
    stretches = (None, 128, 256, 512, 1024)
    return best_of(
        ((replace(launch, stretch=stretch), f"stretch {stretch}") for stretch in stretches), ("forward", "backward")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--only", nargs="*", default=None, help="names of cases; all unless given")
    parser.add_argument("--limit-s", type=float, default=240.0)
    options = parser.parse_args()
    over = partial(Limit(options.limit_s).over, 15.0)
    cases = tuple(case for case in CASES if options.only is None or case.name in options.only)
    record = Record.of("cuda")
    try:
        for case in cases:
            if over():
                print("time is up: not timed:", case.name)
                continue
            time_case(record, case)
            torch.cuda.empty_cache()
        if not over():
            time_host(record)
        if options.tune:
            for case in cases:
                if over():
                    break
                print("tuning", case.name)
                launch = tune(record, case, over)
                record.add("launches", {"case": case.name} | asdict(launch))
                print("best", launch)
                time_case(record, case, launch)
        time_rivals(record, cases, over)
    finally:
        record.save(options.out)


if __name__ == "__main__":
    main()
