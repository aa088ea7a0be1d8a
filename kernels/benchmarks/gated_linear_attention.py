"""Check and time gated linear attention on a CUDA device, beside other libraries where they are installed.

    python kernels/benchmarks/gated_linear_attention.py OUT.json [--tune] [--only NAME ...] [--limit-s 240]

bfloat16. `device_ms` is the sum of the times of all kernels that one call starts (profiler, mean of ten calls);
`called_ms` is what a caller waits for: through the torch op, with autograd where gradients are wanted (median of
`triton.testing.do_bench`, L2 cleared between calls); `host_us` is what a call of a tiny shape takes before it returns.
`error` is the largest of outputs and gradients of the same widths at 2 x 299 tokens, against float64.
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
Launches = dict[str, fused.Launch]


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
        return sample_inputs(self.workload(state=state, **changes), seed=0, device="cuda")


CASES = (
    Case(name="D64 L2k", b=16, t=2_048),
    Case(name="D64 L8k", b=4, t=8_192),
    Case(name="D64 L32k", b=1, t=32_768),
    Case(name="D64 L8k bf16 decay", b=4, t=8_192, decay_dtype="bfloat16"),
    Case(name="D64 L8k packed", b=1, t=32_768, documents=24),
    Case(name="RWKV-6 L8k", b=4, t=8_192, read="before"),
    Case(name="D128 L8k", b=4, t=8_192, n=128, p=128),
)
def ours(inputs: dict[str, Any]) -> Tensor:
    return gated_linear_attention(**inputs, kernel="fused")[0]


def launched(launches: Launches) -> Any:
    """The kernel with its functions bound to launches."""

    class Bound:
        forward = staticmethod(partial(fused.forward, launches))
        backward = staticmethod(partial(fused.backward, launches=launches))

    kernel = replace(CATALOGUE.kernel("gated_linear_attention", "fused"))
    kernel.__dict__["torch_half"] = Bound
    return kernel


def default_launches(case: Case) -> Launches:
    return {name: fused.launch_of(case.n, case.p, name) for name in ("summarise", "read", "differentiate")}


def check(case: Case, launches: Launches) -> tuple[float, str, bool]:
    """The largest error at the case's widths and a small size, its name, and whether all are within tolerance."""
    arguments = case.inputs(state=True, b=1 if case.documents else 2, t=299, h=min(case.h, 4))
    # Cut into two stretches, as the timed shapes are.
    small = {name: replace(launch, stretch=256) for name, launch in launches.items()}
    kernel = launched(small)
    errors = kernel_errors(OPERATOR, kernel, arguments, gradients=True)
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name, judge(OPERATOR, kernel, case.workload(), errors).passed


def time_case(record: Record, case: Case, launches: Launches | None = None) -> None:
    """Defaults are timed through the torch op; launches that were asked for are timed as kernels alone."""
    row: dict[str, Any] = {"case": asdict(case), "tuned": launches is not None}
    with surviving(row):
        row["error"], row["error_of"], row["passed"] = check(case, launches or default_launches(case))
        inputs = case.inputs()
        if launches is None:
            row |= Timed(ours, inputs).times()
        else:
            row |= kernel_times(inputs, launches)
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


def kernel_times(inputs: dict[str, Any], launches: Launches) -> dict[str, Any]:
    pull = torch.randn_like(inputs["v"])

    def forward() -> tuple[Tensor, ...]:
        return fused.forward(launches, **inputs)

    def both() -> None:
        fused.backward(inputs, forward(), (pull, None), launches)

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


def candidates(base: fused.Launch, kernel: str, case: Case) -> Iterator[fused.Launch]:
    """Tokens a chunk, tiles of the state, warps, stages of loads; the one that stands comes first."""
    width = max(16, case.n if kernel == "differentiate" else case.p)
    chunks = (64, 32, 16) if kernel == "summarise" else (16, 32)
    yield base
    for chunk, tile, warps, stages in itertools.product(
        chunks, sorted({base.tile, 64, 32}, reverse=True), (4, 8), (1, 2, 3)
    ):
        launch = replace(base, chunk=chunk, tile=tile, num_warps=warps, num_stages=stages)
        if tile <= width and launch != base:
            yield launch


def tune(record: Record, case: Case, over: Callable[[], bool]) -> Launches:
    """The launches with the least device time; all kernels of a call share the length of a stretch."""
    inputs = case.inputs()
    pull = torch.randn_like(inputs["v"])
    launches = default_launches(case)
    expected = fused.forward(**inputs)[0]

    def measure(trial: Launches, direction: str, shown: str) -> float:
        """Milliseconds of a direction, or of both; infinite where it raises or its result is another."""
        row: dict[str, Any] = {"case": case.name, "direction": direction}
        row["launches"] = {name: asdict(launch) for name, launch in trial.items()}
        with surviving(row):
            outputs = fused.forward(trial, **inputs)
            apart = distance(outputs[0], expected)
            functions: dict[str, Callable[[], object]] = {
                "forward": lambda: fused.forward(trial, **inputs),
                "backward": lambda: fused.backward(inputs, outputs, (pull, None), trial),
            }
            times = {
                name: device_parts(function) for name, function in functions.items() if direction in (name, "both")
            }
            row |= {"distance": apart, "parts": times, "ms": sum(sum(parts.values()) for parts in times.values())}
        record.add("tuning", row)
        launch = trial[shown]
        label = f"{shown} chunk {launch.chunk} tile {launch.tile} warps {launch.num_warps} stages {launch.num_stages}"
        label += f" stretch {launch.stretch}"
        print(f"  {direction:8} {label:72} {row.get('ms', 0):.3f} {row.get('failure', '')[:80]}", flush=True)
        return float(row["ms"]) if row.get("distance", 1.0) < 0.05 else float("inf")

    def best_of(trials: Iterator[Launches], direction: str, shown: str) -> Launches:
        best, least = launches, float("inf")
        for trial in trials:
            if over():
                print("time is up: the rest is not tuned")
                break
            milliseconds = measure(trial, direction, shown)
            if milliseconds < least:
                best, least = trial, milliseconds
        return best

    for kernel, direction in (("read", "forward"), ("differentiate", "backward"), ("summarise", "forward")):
        tried = candidates(launches[kernel], kernel, case)
        launches = best_of(({**launches, kernel: launch} for launch in tried), direction, kernel)

    def stretches() -> Iterator[Launches]:
        for stretch in (None, 128, 256, 512, 1024):
            yield {name: replace(launch, stretch=stretch) for name, launch in launches.items()}

    return best_of(stretches(), "both", "read")


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
                launches = tune(record, case, over)
                found = {name: asdict(launch) for name, launch in launches.items()}
                record.add("launches", {"case": case.name} | found)
                print("best", *(f"{name}: {launch}" for name, launch in launches.items()), sep="\n  ")
                time_case(record, case, launches)
        time_rivals(record, cases, over)
    finally:
        record.save(options.out)


if __name__ == "__main__":
    main()
