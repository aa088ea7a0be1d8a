"""Check and time linear attention on a CUDA device, beside other libraries where they are installed.

    python kernels/benchmarks/linear_attention.py OUT.json [--tune] [--only NAME ...] [--limit-s 240]

bfloat16. `device_ms` is the sum of the times of all kernels that one call starts (profiler, mean of ten calls);
`called_ms` is what a caller waits for: through the torch op, with autograd where gradients are wanted (median of
`triton.testing.do_bench`, L2 cleared between calls); `host_us` is what a call of a tiny shape takes before it returns.
`error` is the largest of outputs and gradients of the same widths at 2 x 299 tokens, against float64.
With --tune, launches are tried for each case, backward then forward then the length of a segment, and the best are
printed and kept for the timings; the package itself keeps what `fused.launch_of` says. A launch counts only where the
kernels that are timed are within tolerance of float64 first. OUT.json is written at every row.
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
from subquad_kernels.linear_attention import fused
from subquad_kernels.linear_attention.chunk_states import Size
from subquad_kernels.linear_attention.definition import sample_inputs
from subquad_kernels.operators import linear_attention
from subquad_kernels.self_check import judge, kernel_errors
from subquad_kernels.workload import Workload

OPERATOR = CATALOGUE.operator("linear_attention")
Call = Callable[[dict[str, Any]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape that is timed; `decay` is head (retention), token (simple GLA) or none."""

    name: str
    b: int
    t: int
    h: int = 16
    h_k: int = 16
    n: int = 64
    p: int = 64
    decay: str = "head"
    write_gate: bool = False
    diagonal: bool = False
    documents: int = 0

    def workload(self, *, state: bool = False, **changes: int) -> Workload:
        shape = {axis: getattr(self, axis) for axis in ("b", "t", "h", "h_k", "n", "p")} | changes
        if self.documents:
            shape["documents"] = self.documents
        options: dict[str, Any] = {"decay": self.decay, "initial_state": state}
        options |= {"write_gate": self.write_gate, "diagonal": self.diagonal}
        return Workload(operator="linear_attention", shape=shape, dtype="bfloat16", phase="backward", options=options)

    def inputs(self, *, state: bool = False, **changes: int) -> dict[str, Any]:
        found = sample_inputs(self.workload(state=state, **changes), seed=0, device="cuda")
        if self.decay == "head":  # RetNet's own
            found["log_decay"] = torch.log1p(-(2.0 ** (-5 - torch.arange(self.h, device="cuda"))))
        return found


CASES = (
    Case(name="D64 L2k", b=16, t=2_048),
    Case(name="D64 L8k", b=4, t=8_192),
    Case(name="D64 L32k", b=1, t=32_768),
    Case(name="D64 L8k token", b=4, t=8_192, decay="token"),
    Case(name="D64 L8k packed", b=1, t=32_768, decay="token", documents=24),
    Case(name="D128 L8k", b=4, t=8_192, n=128, p=128),
    Case(name="D128 L32k", b=1, t=32_768, n=128, p=128),
    Case(name="D128 L8k gated", b=4, t=8_192, n=128, p=128, decay="token", write_gate=True),
    Case(name="D128 L8k packed", b=1, t=32_768, n=128, p=128, decay="token", documents=24),
    Case(name="RetNet wide", b=4, t=8_192, h=4, h_k=4, n=256, p=512),
    Case(name="SSD L8k", b=4, t=8_192, h=32, h_k=1, n=128, p=64, decay="token", write_gate=True),
    Case(name="SSD L32k", b=1, t=32_768, h=32, h_k=1, n=128, p=64, decay="token", write_gate=True),
    Case(name="Mamba-3 L8k", b=4, t=8_192, h=32, h_k=32, n=128, p=64, decay="token", write_gate=True, diagonal=True),
    Case(name="D64 L128k", b=1, t=131_072),
    Case(name="SSD narrow", b=4, t=8_192, h_k=1, p=32, decay="token", write_gate=True),
    Case(name="RetNet narrow", b=4, t=8_192, n=32),
)


def ours(inputs: dict[str, Any]) -> Tensor:
    return linear_attention(**inputs, kernel="fused")[0]


def launched(launches: dict[str, fused.Launch]) -> Any:
    """The kernel with its functions bound to launches."""

    class Bound:
        @staticmethod
        def forward(**arguments: Any) -> tuple[Tensor, ...]:
            return fused.forward(launches["forward"], **arguments)

        @staticmethod
        def backward(*values: Any) -> dict[str, Tensor | None]:
            return fused.backward(*values, launches["backward"])

    kernel = replace(CATALOGUE.kernel("linear_attention", "fused"))
    kernel.__dict__["torch_half"] = Bound
    return kernel


def default_launches(case: Case) -> dict[str, fused.Launch]:
    return {
        direction: fused.launch_of(
            case.n, case.p, torch.bfloat16,
            backward=direction == "backward", group=case.h // case.h_k, packed=case.documents > 0,
        )
        for direction in ("forward", "backward")
    }  # fmt: skip


def check(case: Case, launches: dict[str, fused.Launch], *, as_timed: bool = False) -> tuple[float, str, bool]:
    """The largest error at the case's widths and a small size, its name, and whether all are within tolerance.

    With states and fewer heads; `as_timed` with those of the case, so that what is timed later is what is compiled.
    """
    heads = {"h": case.h, "h_k": case.h_k}
    if not as_timed:
        h_k, shared = min(case.h_k, 4), launches["forward"].shared
        heads = {"h": min(case.h, 4 if shared is None else (shared.heads or 8) * h_k), "h_k": h_k}
    arguments = case.inputs(state=not as_timed, b=1 if case.documents else 2, t=299, **heads)
    arguments["log_decay"] = None if case.decay == "none" else arguments["log_decay"]
    if case.decay == "head":
        arguments["log_decay"] = arguments["log_decay"][: arguments["v"].shape[2]].contiguous()
    # Cut into two segments, as the timed shapes are.
    small = {name: replace(launch, enough=10**9, segment_len=256) for name, launch in launches.items()}
    kernel = launched(small)
    errors = kernel_errors(OPERATOR, kernel, arguments, gradients=True)
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name, judge(OPERATOR, kernel, case.workload(), errors).passed


def time_case(record: Record, case: Case, launches: dict[str, fused.Launch] | None = None) -> None:
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


def kernel_times(inputs: dict[str, Any], launches: dict[str, fused.Launch]) -> dict[str, Any]:
    pull = torch.randn_like(inputs["v"])

    def forward() -> tuple[Tensor, ...]:
        return fused.forward(launches["forward"], **inputs)

    def both() -> None:
        fused.backward(inputs, forward(), (pull, None), launches["backward"])

    found: dict[str, Any] = {}
    for name, function in (("forward", forward), ("both", both)):
        parts = device_parts(function)
        found |= {f"{name}_device_ms": sum(parts.values()), f"{name}_parts": parts}
    return found


def time_host(record: Record) -> None:
    """Microseconds until a call returns, of a shape that the device finishes sooner."""
    timed = Timed(ours, Case(name="tiny", b=1, t=1_024, h=2, h_k=2).inputs())
    functions = {
        "forward": lambda: fused.forward(**timed.inputs), "op forward": timed.forward,
        "op forward+backward": timed.both,
    }  # fmt: skip
    row = {name: host_us(function) for name, function in functions.items()}
    print("host us a call:", {name: round(value, 1) for name, value in row.items()}, flush=True)
    record.add("host_us", row)


def _fla_retention(case: Case) -> Call | None:
    call = importlib.import_module("fla.ops.retention").chunk_retention
    plain = case.decay == "head" and case.h == case.h_k
    return (lambda x: call(x["q"], x["k"], x["v"])[0]) if plain else None


def _fla_simple_gla(case: Case) -> Call | None:
    call = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    plain = case.decay == "token" and case.h == case.h_k and not (case.write_gate or case.documents)
    return (lambda x: call(x["q"], x["k"], x["v"], g=x["log_decay"])[0]) if plain else None


def _mamba_ssd(case: Case) -> Call | None:
    call = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    if not case.write_gate or case.diagonal:
        return None
    # It takes the step size and the rate: the decay follows from them, so that only the cost compares.
    rates = -torch.ones(case.h, device="cuda")
    return lambda x: call(x["v"], x["write_gate"], rates, x["k"], x["q"], chunk_size=256)


RIVALS: dict[str, Callable[[Case], Call | None]] = {
    "fla chunk_retention": _fla_retention,
    "fla chunk_simple_gla": _fla_simple_gla,
    "mamba_ssm mamba_chunk_scan_combined": _mamba_ssd,
}


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
                if "mamba" not in name:
                    row["distance"] = distance(timed.forward(), ours(timed.inputs))
                row |= timed.times()
        shown = {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}
        print(f"rival {name:36} {case.name:16}", shown, row.get("failure", "")[:90], flush=True)
        record.add("rivals", row)


def candidates(base: fused.Launch, case: Case) -> Iterator[fused.Launch]:
    """Tiles of values, warps, stages of loads, and a cap on registers; the one that stands comes first."""
    if base.kept is not None:
        yield from kept_candidates(base, case)
        return
    own = base.tile_p
    tried = (
        (own, base.num_warps, base.num_stages, None), (own, 4, 2, None), (own, 4, 3, None), (own, 4, 1, None),
        (own, 4, 2, 168), (64, 4, 2, None), (32, 4, 2, None), (128, 8, 2, None), (own, 8, 2, None),
    )  # fmt: skip
    for tile, warps, stages, registers in dict.fromkeys(tried):
        if tile <= max(16, case.p):
            yield replace(base, tile_p=tile, num_warps=warps, num_stages=stages, registers=registers)


def kept_candidates(base: fused.Launch, case: Case) -> Iterator[fused.Launch]:
    """Sizes of the walks and of what takes a chunk, in chunks of 64 and 128; then no states kept, as it was before."""
    assert base.kept is not None
    yield base
    yield replace(base, kept=None, num_warps=8, num_stages=2 if case.n <= 128 else 1)
    if max(case.n, case.p) > base.kept.tile:
        for warps, stages, registers in ((8, 1, None), (8, 1, 128), (8, 3, None), (4, 1, None)):
            size = Size(num_warps=warps, num_stages=stages, registers=registers)
            yield replace(base, kept=replace(base.kept, chunks=size))
        return
    for warps, stages, registers in ((8, 3, 128), (8, 1, 128), (8, 2, None), (8, 3, None), (4, 2, None)):
        walk = Size(num_warps=warps, num_stages=stages, registers=registers)
        yield replace(base, kept=replace(base.kept, borders=walk, states=walk))
    yield replace(base, kept=replace(base.kept, chunks=Size(num_warps=8)))
    if not case.documents:  # the residual of packed documents lies by the forward's chunks
        for walk in (Size(num_warps=8, num_stages=2), Size(num_warps=8, num_stages=1, registers=128)):
            kept = replace(base.kept, borders=walk, states=walk, chunks=Size(num_warps=8))
            yield replace(base, chunk=128, kept=kept)


def shown(launch: fused.Launch) -> str:
    """What is tried of a launch, in a line."""
    where = f"chunk {launch.chunk} segment {launch.segment_len} enough {launch.enough}"
    if launch.kept is not None:
        walk = launch.kept.states
        sizes = f"warps {walk.num_warps} stages {walk.num_stages} registers {walk.registers}"
        chunk = launch.kept.chunks
        taken = f"chunk's warps {chunk.num_warps} stages {chunk.num_stages} registers {chunk.registers}"
        return f"kept: walk {sizes} {taken} {where}"
    sizes = f"warps {launch.num_warps} stages {launch.num_stages} registers {launch.registers}"
    return f"tile {launch.tile_p} {sizes} {where}"


def tune(record: Record, case: Case, over: Callable[[], bool]) -> dict[str, fused.Launch]:
    """The launches with the least device time; both directions share chunk and segment length."""
    inputs = case.inputs()
    pull = torch.randn_like(inputs["v"])
    launches = default_launches(case)
    expected = fused.forward(**inputs)[0]

    def measure(trial: dict[str, fused.Launch], direction: str) -> float:
        """Milliseconds of a direction, or of both; infinite where it raises or its result is another."""
        row: dict[str, Any] = {"case": case.name, "direction": direction}
        row["launches"] = {name: asdict(launch) for name, launch in trial.items()}
        with surviving(row):
            row["error"], row["error_of"], row["passed"] = check(case, trial, as_timed=True)
            outputs = fused.forward(trial["forward"], **inputs)
            apart = distance(outputs[0], expected)
            functions: dict[str, Callable[[], object]] = {
                "forward": lambda: fused.forward(trial["forward"], **inputs),
                "backward": lambda: fused.backward(inputs, outputs, (pull, None), trial["backward"]),
            }
            times = {
                name: device_parts(function) for name, function in functions.items() if direction in (name, "both")
            }
            row |= {"distance": apart, "parts": times, "ms": sum(sum(parts.values()) for parts in times.values())}
        record.add("tuning", row)
        label = shown(trial["forward" if direction == "forward" else "backward"])
        state = "ok  " if row.get("passed") else "FAIL"
        found = f"{row.get('ms', 0):.3f} error {row.get('error', 0):.1e} {row.get('failure', '')[:80]}"
        print(f"  {state} {direction:8} {label:84} {found}", flush=True)
        if direction != "forward" and row.get("ms"):
            show_parts(row["parts"]["backward"])
        return float(row["ms"]) if row.get("passed") and row.get("distance", 1.0) < 0.05 else float("inf")

    def best_of(trials: Iterator[dict[str, fused.Launch]], direction: str) -> dict[str, fused.Launch]:
        best, least = launches, float("inf")
        for trial in trials:
            if over():
                print("time is up: the rest is not tuned")
                break
            milliseconds = measure(trial, direction)
            if milliseconds < least:
                best, least = trial, milliseconds
        return best

    for direction in ("backward", "forward"):
        tried = candidates(launches[direction], case)
        launches = best_of((launches | {direction: launch} for launch in tried), direction)

    def layouts() -> Iterator[dict[str, fused.Launch]]:
        yield launches
        for segment_len, enough in (
            (256, 256),
            (512, 256),
            (1024, 256),
            (2048, 256),
            (4096, 256),
            (1024, 1),
            (1024, 10**9),
        ):
            yield {k: replace(v, segment_len=segment_len, enough=enough) for k, v in launches.items()}
        yield {k: replace(v, chunk=128, num_warps=8) for k, v in launches.items()}

    return best_of(layouts(), "both")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument(
        "--only", nargs="*", default=None, help="names of cases; all, and the host's time, unless given"
    )
    parser.add_argument("--limit-s", type=float, default=240.0)
    options = parser.parse_args()
    over = partial(Limit(options.limit_s).over, 15.0)
    cases = tuple(case for case in CASES if options.only is None or case.name in options.only)
    record = Record.of("cuda", options.out)
    for case in cases:
        if over():
            print("time is up: not timed:", case.name)
            continue
        time_case(record, case)
        torch.cuda.empty_cache()
    if options.only is None and not over():
        time_host(record)
    if options.tune:
        for case in cases:
            if over():
                break
            if default_launches(case)["forward"].shared is not None:
                print("shared_keys.py tunes", case.name)
                continue
            print("tuning", case.name)
            launches = tune(record, case, over)
            found = {name: asdict(launch) for name, launch in launches.items()}
            record.add("launches", {"case": case.name} | found)
            print("best", *(f"{name}: {launch}" for name, launch in launches.items()), sep="\n  ")
            time_case(record, case, launches)
    time_rivals(record, cases, over)


if __name__ == "__main__":
    main()
