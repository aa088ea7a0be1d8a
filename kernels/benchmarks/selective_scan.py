"""Check and time the fused selective scan on a CUDA device.

    python kernels/benchmarks/selective_scan.py OUT.json [--tune] [--limit-s 100]

Times are device times (median of `triton.testing.do_bench`, L2 cleared between calls) of 32,768 tokens, 2048 channels
and 16 states in bfloat16, with gate, skip and step bias; `parts` are those of each kernel in one forward and backward.
First the first calls of a training step are made in a process and a cache of their own, as `first_calls` makes them,
and timed. Checks run side by side in processes of their own. With --tune, so do the compilations of the launches in
GRID, each of which is checked against the chunked kernel; those that pass are timed at every batch, cut as CUTS says,
for as long as the limit allows. Each batch's fastest are printed, the best over all batches is timed with its parts,
and what to write in `fused.launch_of` is printed. Last, mamba-ssm's CUDA scan where it is installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.compilations import compilations
from subquad_kernels.first_calls import first_calls
from subquad_kernels.selective_scan import fused
from subquad_kernels.selective_scan.definition import sample_inputs
from subquad_kernels.self_check import kernel_errors, stack_versions
from subquad_kernels.workload import Workload

TOKENS, CHANNELS, STATES, BATCHES = 32_768, 2_048, 16, (16, 4, 1)
OPERATOR = CATALOGUE.operator("selective_scan")

# What differs from `fused.launch_of`: compiled once each. Registers decide how many warps share a scheduler: 255 two,
# 200 two and a half, 168 three, 128 four.
GRID: dict[str, tuple[dict[str, Any], ...]] = {
    "forward": (
        {},
        {"group": 16},
        {"registers": 128},
        {"group": 16, "registers": None},
    ),
    "backward": (
        {},
        {"registers": 128},
        {"registers": 168},
        {"registers": 128, "group": 2},
        {"registers": 200},
        {"registers": 168, "tile_c": 8},
    ),
}
# How time is cut: costs no compilation. Programs are few at b = 4 and 1; `enough` above 2048 cuts b = 16 too, and of
# 512 leaves b = 4 whole. Forward, with no first segment of their own all segments but the last are summarised.
CUTS: dict[str, tuple[dict[str, Any], ...]] = {
    "forward": (
        {},
        {"first": 0.8},
        {"first": 1.0},
        {"programs": 1056},
        {"first": 0.4},
        {"programs": 2112},
        {"enough": 512},
        {"programs": 4224},
        {"first": 0.0},
    ),
    "backward": ({}, {"programs": 1584}, {"programs": 1056}, {"programs": 4224}, {"programs": 4752, "enough": 4096}),
}
LONGEST_MS = 20.0
"""A launch that takes longer than this once is not timed again: one that is not cut, at b = 1."""


@dataclass
class Record:
    """What OUT.json holds."""

    device: str
    versions: tuple[str, ...]
    first_calls: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    tuning: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    rivals: list[dict[str, Any]] = field(default_factory=list)
    launches: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def workload(
    b: int, t: int, *, c: int = CHANNELS, n: int = STATES, state: bool = False, reversed: bool = False, **others: int
) -> Workload:
    options: dict[str, Any] = dict.fromkeys(("softplus", "skip", "gate", "dt_bias"), True) | {"initial_state": state}
    if reversed:
        options["reversed"] = True
    shape = {"b": b, "t": t, "c": c, "n": n} | others
    return Workload(operator="selective_scan", shape=shape, dtype="bfloat16", phase="backward", options=options)


def inputs(case: Workload) -> dict[str, Any]:
    return sample_inputs(case, seed=0, device="cuda")


def milliseconds(function: Callable[[], object], repeat_ms: int = 50) -> float:
    return float(do_bench(function, warmup=10, rep=repeat_ms, return_mode="median"))


CHECKS = {
    "t=509": workload(2, 509, c=160, state=True),
    "t=300 packed": workload(1, 300, c=96, state=True, documents=6),
    "t=300 packed reversed": workload(1, 300, c=96, state=True, documents=6, reversed=True),
    "t=300 n=13": workload(1, 300, c=77, n=13),
    "t=1": workload(4, 1, c=256, state=True),
}


def check_against_reference(name: str) -> dict[str, Any]:
    """bfloat16 at small sizes: outputs and every gradient against float64."""
    tolerance = OPERATOR.tolerances["bfloat16"]
    kernel = CATALOGUE.kernel("selective_scan", "fused")
    errors = kernel_errors(OPERATOR, kernel, inputs(CHECKS[name]), gradients=True)
    passed = all(
        error <= (tolerance.gradient if output.startswith("d_") else tolerance.output)
        for output, error in errors.items()
    )
    return {"case": name, "against": "float64 reference", "errors": errors, "passed": passed}


def check_against_chunked() -> Iterator[dict[str, Any]]:
    """bfloat16 at larger sizes, whole and cut: against the chunked kernel, relative to its largest value."""
    for b, t, c in ((16, 2_048, 2_048), (1, 4_096, 512)):
        row: dict[str, Any] = {"case": f"b={b} t={t} c={c}", "against": "chunked"}
        try:
            arguments = inputs(workload(b, t, c=c))
            pull = torch.randn_like(arguments["x"])
            results: list[dict[str, Tensor]] = []
            for kernel in ("fused", "chunked"):
                functions = CATALOGUE.kernel("selective_scan", kernel).torch_half
                outputs = functions.forward(**arguments)
                found = functions.backward(arguments, outputs, (pull, None))
                results.append({"y": outputs[0]} | {f"d_{k}": v for k, v in found.items() if v is not None})
                del outputs, found
            mine, theirs = results
            row["errors"] = {name: distance(mine[name], theirs[name]) for name in mine}
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

    def time(self, direction: str, launch: fused.Launch, repeat_ms: int = 50) -> float:
        if direction == "forward":
            return milliseconds(lambda: fused.forward(launch, **self.arguments), repeat_ms)
        return milliseconds(lambda: fused.backward(self.arguments, self.outputs, (self.pull, None), launch), repeat_ms)

    def time_both(self, launches: dict[str, fused.Launch]) -> float:
        def both() -> None:
            outputs = fused.forward(launches["forward"], **self.arguments)
            fused.backward(self.arguments, outputs, (self.pull, None), launches["backward"])

        return milliseconds(both)

    def parts(self, launches: dict[str, fused.Launch]) -> dict[str, float]:
        """Milliseconds of every kernel in one forward and backward; a scan that is cut launches `scan` twice."""
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            outputs = fused.forward(launches["forward"], **self.arguments)
            fused.backward(self.arguments, outputs, (self.pull, None), launches["backward"])
            torch.cuda.synchronize()
        parts: dict[str, float] = {}
        for event in found.events():
            if event.device_time:
                name = f"scan, launch {1 + ('scan, launch 1' in parts)}" if event.name == "scan" else event.name[:60]
                parts[name] = parts.get(name, 0.0) + event.device_time / 1e3
        return parts


def time_first_calls() -> dict[str, Any]:
    """Seconds of the first calls of a training step, all kernels compiled beside each other, with nothing cached."""
    torch.cuda.init()
    with TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        kernel, started = CATALOGUE.kernel("selective_scan", "fused"), time.perf_counter()
        calls = first_calls([(kernel, workload(16, 2_048))], "cuda")
        seconds = time.perf_counter() - started
    slowest = max((one for call in calls for one in call.compiled), key=lambda one: one.seconds)
    failures = [call.failure for call in calls if call.failure]
    return {"seconds": seconds, "slowest": slowest.kernel, "slowest_s": slowest.seconds, "failures": failures}


def compile_and_check(direction: str, launch: fused.Launch) -> dict[str, Any]:
    """Compile what a direction launches, into triton's cache on disk; errors against the chunked kernel, time cut."""
    arguments = inputs(workload(2, 509, c=160))
    pull = torch.randn_like(arguments["x"])
    cut = fused.with_segments(launch, 128)
    chunked = CATALOGUE.kernel("selective_scan", "chunked").torch_half
    expected: dict[str, Tensor | None]
    found: dict[str, Tensor | None]
    with compilations() as compiled:
        outputs = fused.forward(cut if direction == "forward" else None, **arguments)
        if direction == "forward":
            again = fused.forward(cut, **arguments)
            if not all(map(torch.equal, outputs, again)):
                raise ArithmeticError("two calls differ in the bits of an output")
            names = ("y", "final_state", "boundaries", "ungated")
            expected, found = dict(zip(names, chunked.forward(**arguments))), dict(zip(names, outputs))
        else:
            expected = chunked.backward(arguments, outputs, (pull, None))
            expected = {name: other for name, other in expected.items() if arguments[name] is not None}
            found = fused.backward(arguments, outputs, (pull, None), cut)
            same = fused.backward(arguments, outputs, (pull, None), cut)
            for name, tensor in found.items():
                if tensor is not None and not torch.equal(tensor, same[name]):
                    raise ArithmeticError(f"two calls differ in the bits of {name}")
    torch.cuda.synchronize()
    errors = {name: distance(found[name], other) for name, other in expected.items() if other is not None}
    if max(errors.values()) > 1.6e-2:
        raise ArithmeticError(f"far from the chunked kernel: {errors}")
    return {"errors": errors, "compile_s": {one.kernel: one.seconds for one in compiled}}


def distance(mine: Tensor | None, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value; NaN counts as infinitely far."""
    assert mine is not None
    difference = (mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    return float(difference.nan_to_num(nan=math.inf))


def grid() -> list[tuple[str, fused.Launch]]:
    return [
        (direction, replace(fused.launch_of(STATES, backward=direction == "backward"), **changes))
        for direction, variants in GRID.items()
        for changes in variants
    ]


def check_and_compile(record: Record, tried: list[tuple[str, fused.Launch]]) -> list[tuple[str, fused.Launch]]:
    """Check small cases and compile launches side by side, each in a process of its own; the launches that can run."""
    runnable = []
    with ProcessPoolExecutor(max_workers=min(14, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        checks = {name: pool.submit(check_against_reference, name) for name in CHECKS}
        compiled = [pool.submit(compile_and_check, *entry) for entry in tried]
        for name, check in checks.items():
            try:
                record.checks.append(check.result())
            except Exception as error:  # one failure does not lose the rest
                record.checks.append(
                    {"case": name, "passed": False, "failure": f"{type(error).__name__}: {error}"[:400]}
                )
        for (direction, launch), done in zip(tried, compiled):
            try:
                record.tuning.append({"direction": direction, "launch": asdict(launch)} | done.result())
                runnable.append((direction, launch))
                print("ok  ", direction, described(launch), record.tuning[-1]["compile_s"], flush=True)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"[:300]
                record.tuning.append({"direction": direction, "launch": asdict(launch), "failure": failure})
                print("FAIL", direction, described(launch), failure[:100], flush=True)
    return runnable


def tune(
    record: Record,
    launches: dict[str, fused.Launch],
    compiled: list[tuple[str, fused.Launch]],
    over: Callable[[], bool],
    out: Path,
) -> None:
    """Time every launch and cut at every batch; the least sum over batches stays in `launches`."""
    found: dict[tuple[str, fused.Launch], dict[int, float]] = {}
    cases = [Directions(b) for b in BATCHES]
    for place in range(max(len(cuts) for cuts in CUTS.values())):  # the likely cut of all first
        for direction, base in compiled:
            if place >= len(CUTS[direction]) or over():
                continue
            launch = replace(base, **CUTS[direction][place])
            times = found.setdefault((direction, launch), {})
            parts: dict[int, dict[str, float]] = {}
            row: dict[str, Any] = {"direction": direction, "launch": asdict(launch), "ms": times, "parts": parts}
            try:
                for case in cases:
                    if case.time(direction, launch, repeat_ms=1) < LONGEST_MS:
                        times[case.b] = case.time(direction, launch, repeat_ms=25)
                        parts[case.b] = case.parts({**launches, direction: launch}) if place == 0 else {}
            except Exception as error:
                row["failure"] = f"{type(error).__name__}: {error}"[:200]
            record.tuning.append(row)
            record.save(out)
            print(direction, described(launch), {b: round(ms, 3) for b, ms in times.items()}, flush=True)
    for direction in GRID:
        print(f"{direction}: fastest first")
        rows = [(launch, times) for (name, launch), times in found.items() if name == direction]
        for b in BATCHES:
            for launch, times in sorted((row for row in rows if b in row[1]), key=lambda row: row[1][b])[:4]:
                print(f"  b={b:<3} {times[b]:8.3f} ms  {described(launch)}")
        whole = [row for row in rows if len(row[1]) == len(BATCHES)]
        if whole:
            launches[direction], times = min(whole, key=lambda row: sum(row[1].values()))
            print("  all  ", *(f"{ms:8.3f}" for ms in times.values()), described(launches[direction]), flush=True)


def described(launch: fused.Launch) -> str:
    names = ("tile_c", "group", "registers", "enough", "programs", "first")
    return " ".join(f"{name}={getattr(launch, name)!r}" for name in names)


def time_all(record: Record, launches: dict[str, fused.Launch]) -> None:
    for b in BATCHES:
        row: dict[str, Any] = {"name": name_of(b), "b": b, "t": TOKENS // b}
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


def time_rivals(record: Record) -> None:
    """mamba-ssm's CUDA scan where it is installed, as it likes it: channels first, and nothing copied."""
    for b in BATCHES:
        row: dict[str, Any] = {"rival": "mamba_ssm selective_scan_fn", "case": name_of(b)}
        try:
            call = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
            given = {key: value for key, value in inputs(workload(b, TOKENS // b)).items() if isinstance(value, Tensor)}
            for key in ("x", "dt", "B", "C", "z"):
                given[key] = given[key].mT.contiguous()
            wanted = [given[key].requires_grad_() for key in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
            forward = partial(call, *wanted, delta_softplus=True)
            pull = torch.randn_like(given["x"])
            with torch.no_grad():
                row["forward_device_ms"] = milliseconds(forward)
            row["both_device_ms"] = milliseconds(lambda: torch.autograd.grad(forward(), wanted, pull))  # noqa: B023
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {error}"[:200]
        print(row, flush=True)
        record.rivals.append(row)


def name_of(b: int) -> str:
    return f"b={b} t={TOKENS // b}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--limit-s", type=float, default=100.0)
    options = parser.parse_args()
    end = time.monotonic() + options.limit_s
    record = Record(device=torch.cuda.get_device_name(), versions=stack_versions())
    launches = {name: fused.launch_of(STATES, backward=name == "backward") for name in ("forward", "backward")}
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as alone:
            record.first_calls = alone.submit(time_first_calls).result()
        print("first calls", record.first_calls, flush=True)
        compiled = check_and_compile(record, grid() if options.tune else [])
        record.checks += check_against_chunked()
        for row in record.checks:
            worst = max(row.get("errors", {"": 0.0}).items(), key=lambda item: item[1])
            print("ok  " if row["passed"] else "FAIL", row["case"], worst, row.get("failure", ""), flush=True)
        record.save(options.out)
        time_all(record, launches)
        if options.tune:
            tune(record, launches, compiled, lambda: time.monotonic() > end - 10, options.out)
            time_all(record, launches)
            print("fused.launch_of at 16 states:")
            for name, launch in launches.items():
                print(f"  {name}: Launch({described(launch).replace(' ', ', ')})")
        time_rivals(record)
    finally:
        record.launches = {name: asdict(launch) for name, launch in launches.items()}
        record.save(options.out)


if __name__ == "__main__":
    main()
