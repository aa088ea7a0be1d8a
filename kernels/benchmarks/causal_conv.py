"""Check and time the fused causal convolution on a CUDA device.

    python kernels/benchmarks/causal_conv.py OUT.json [--tune] [--limit-s 100]

Times are device times (median of `triton.testing.do_bench`, L2 cleared between calls) of 32,768 tokens, 2048 channels
and 4 taps in bfloat16, with bias and SiLU; `parts` are those of each kernel in one forward and backward.
With --tune, each direction is first tried under a grid of launches, and the best stay for the timings; the package
itself keeps what `fused.launch_of` says.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.causal_conv import fused
from subquad_kernels.causal_conv.definition import sample_inputs
from subquad_kernels.self_check import kernel_errors, stack_versions
from subquad_kernels.workload import Workload

TOKENS, CHANNELS, TAPS, BATCHES = 32_768, 2_048, 4, (16, 4, 1)
OPERATOR = CATALOGUE.operator("causal_conv")

# (tile_c, group, stretch, num_warps)
GRID: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "forward": (
        (256, 4, 64, 1), (256, 4, 128, 1), (256, 8, 64, 1), (128, 4, 128, 1), (128, 8, 128, 1), (256, 2, 64, 1),
        (512, 4, 64, 2), (1024, 4, 64, 4), (256, 8, 32, 1), (128, 8, 64, 1),
    ),
    "backward": (
        (128, 4, 128, 1), (128, 4, 64, 1), (128, 8, 128, 1), (128, 2, 128, 1), (256, 4, 64, 1), (64, 4, 128, 1),
        (256, 4, 128, 2), (512, 4, 64, 4), (128, 4, 256, 1), (64, 8, 128, 1),
    ),
}  # fmt: skip


@dataclass
class Record:
    """What OUT.json holds."""

    device: str
    versions: tuple[str, ...]
    checks: list[dict[str, Any]] = field(default_factory=list)
    tuning: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    launches: dict[str, dict[str, Any]] = field(default_factory=dict)


def workload(b: int, t: int, *, c: int = CHANNELS, w: int = TAPS, state: bool = False, **others: int) -> Workload:
    shape = {"b": b, "t": t, "c": c, "w": w} | others
    return Workload(
        operator="causal_conv", shape=shape, dtype="bfloat16", phase="backward",
        options={"activation": "silu", "bias": True, "initial_state": state},
    )  # fmt: skip


def inputs(case: Workload) -> dict[str, Any]:
    return sample_inputs(case, seed=0, device="cuda")


def milliseconds(function: Callable[[], object]) -> float:
    return float(do_bench(function, warmup=10, rep=50, return_mode="median"))


def check_against_reference() -> Iterator[dict[str, Any]]:
    """bfloat16 at small sizes: outputs and every gradient against float64."""
    kernel = CATALOGUE.kernel("causal_conv", "fused")
    tolerance = OPERATOR.tolerances["bfloat16"]
    cases = {
        "t=509": workload(2, 509, c=160, state=True),
        "t=300 packed": workload(1, 300, c=96, state=True, documents=6),
        "t=300 w=7": workload(1, 300, c=77, w=7),
        "t=1": workload(4, 1, c=256, state=True),
    }
    for name, case in cases.items():
        row: dict[str, Any] = {"case": name, "against": "float64 reference"}
        try:
            row["errors"] = kernel_errors(OPERATOR, kernel, inputs(case), gradients=True)
            row["passed"] = all(
                error <= (tolerance.gradient if name.startswith("d_") else tolerance.output)
                for name, error in row["errors"].items()
            )
        except Exception as error:  # one failure does not lose the rest
            row |= {"passed": False, "failure": f"{type(error).__name__}: {error}"[:400]}
        yield row


def check_against_conv1d() -> Iterator[dict[str, Any]]:
    """bfloat16 at larger sizes, against the library's convolution, relative to its largest value."""
    for b, t, c in ((16, 2_048, 2_048), (1, 4_096, 512)):
        row: dict[str, Any] = {"case": f"b={b} t={t} c={c}", "against": "conv1d"}
        try:
            arguments = inputs(workload(b, t, c=c))
            pull = torch.randn_like(arguments["x"])
            results: list[dict[str, Tensor]] = []
            for kernel in ("fused", "conv1d"):
                functions = CATALOGUE.kernel("causal_conv", kernel).torch_half
                outputs = functions.forward(**arguments)
                found = functions.backward(arguments, outputs, (pull, None))
                results.append({"y": outputs[0]} | {f"d_{k}": v for k, v in found.items() if v is not None})
                del outputs, found
            mine, theirs = results
            row["errors"] = {
                name: float((mine[name].float() - theirs[name].float()).abs().max() / theirs[name].float().abs().max())
                for name in mine
            }
            row["passed"] = all(error <= 1.6e-2 for error in row["errors"].values())
        except Exception as error:
            row |= {"passed": False, "failure": f"{type(error).__name__}: {error}"[:400]}
        yield row


class Directions:
    """Forward and backward of one call, each under a launch."""

    def __init__(self, b: int) -> None:
        self.b = b
        self.arguments = inputs(workload(b, TOKENS // b))
        self.outputs = fused.forward(**self.arguments)
        self.pull = torch.randn_like(self.arguments["x"])

    def time(self, direction: str, launch: fused.Launch) -> float:
        if direction == "forward":
            return milliseconds(lambda: fused.forward(**self.arguments, launch=launch))
        return milliseconds(lambda: fused.backward(self.arguments, self.outputs, (self.pull, None), launch))

    def time_both(self, launches: dict[str, fused.Launch]) -> float:
        def both() -> None:
            outputs = fused.forward(**self.arguments, launch=launches["forward"])
            fused.backward(self.arguments, outputs, (self.pull, None), launches["backward"])

        return milliseconds(both)

    def parts(self, launches: dict[str, fused.Launch]) -> dict[str, float]:
        """Milliseconds of every kernel in one forward and backward."""
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            outputs = fused.forward(**self.arguments, launch=launches["forward"])
            fused.backward(self.arguments, outputs, (self.pull, None), launches["backward"])
            torch.cuda.synchronize()
        return {event.key[:60]: event.device_time_total / 1e3 for event in found.key_averages()}


def tune(record: Record, launches: dict[str, fused.Launch], over: Callable[[], bool]) -> None:
    """The launch with the least sum of times over the batches."""
    cases = [Directions(b) for b in BATCHES]
    for direction, configurations in GRID.items():
        tried = [
            fused.Launch(tile_c=tile, group=group, stretch=stretch, num_warps=warps)
            for tile, group, stretch, warps in configurations
        ]
        launches[direction] = fastest(record, direction, tried, cases, over) or launches[direction]


def fastest(
    record: Record, direction: str, tried: list[fused.Launch], cases: list[Directions], over: Callable[[], bool]
) -> fused.Launch | None:
    best: tuple[float, fused.Launch] | None = None
    for launch in tried:
        if over():
            print("time is up: the rest is not tuned")
            break
        label = f"tile_c={launch.tile_c} group={launch.group} warps={launch.num_warps} stretch={launch.stretch}"
        row: dict[str, Any] = {"direction": direction, "launch": asdict(launch), "b": [case.b for case in cases]}
        try:
            row["ms"] = [case.time(direction, launch) for case in cases]
            if best is None or sum(row["ms"]) < best[0]:
                best = sum(row["ms"]), launch
            print(f"{direction:8} {label:48}", *(f"{value:8.3f}" for value in row["ms"]), flush=True)
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {error}"[:200]
            print(f"{direction:8} {label:48} {row['failure'][:80]}", flush=True)
        record.tuning.append(row)
    return None if best is None else best[1]


def time_all(record: Record, launches: dict[str, fused.Launch]) -> None:
    for b in BATCHES:
        row: dict[str, Any] = {"b": b, "t": TOKENS // b}
        try:
            case = Directions(b)
            row["forward_ms"] = case.time("forward", launches["forward"])
            row["backward_ms"] = case.time("backward", launches["backward"])
            row["both_ms"] = case.time_both(launches)
            print(f"b={b:<3} t={TOKENS // b:<6}", *(f"{name} {row[name]:.3f}" for name in row if name.endswith("_ms")))
            row["parts"] = case.parts(launches)
            for name, value in sorted(row["parts"].items(), key=lambda item: -item[1])[:8]:
                print(f"      {value:8.3f}  {name}", flush=True)
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {error}"[:400]
            print(row, flush=True)
        record.timings.append(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--limit-s", type=float, default=100.0)
    options = parser.parse_args()
    end = time.monotonic() + options.limit_s
    record = Record(device=torch.cuda.get_device_name(), versions=stack_versions())
    launches = {
        name: fused.launch_of(TOKENS, CHANNELS, TAPS, backward=name == "backward") for name in ("forward", "backward")
    }
    try:
        for row in (*check_against_reference(), *check_against_conv1d()):
            record.checks.append(row)
            worst = max(row.get("errors", {"": 0.0}).items(), key=lambda item: item[1])
            print("ok  " if row["passed"] else "FAIL", row["case"], worst, row.get("failure", ""), flush=True)
        time_all(record, launches)
        if options.tune:
            tune(record, launches, lambda: time.monotonic() > end - 15)
            print({name: str(launch) for name, launch in launches.items()})
            time_all(record, launches)
    finally:
        record.launches = {name: asdict(launch) for name, launch in launches.items()}
        options.out.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
