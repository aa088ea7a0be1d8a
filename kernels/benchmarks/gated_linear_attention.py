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
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.gated_linear_attention import fused
from subquad_kernels.gated_linear_attention.definition import sample_inputs
from subquad_kernels.operators import gated_linear_attention
from subquad_kernels.self_check import kernel_errors, stack_versions
from subquad_kernels.workload import Workload

OPERATOR = CATALOGUE.operator("gated_linear_attention")
DIFFERENTIABLE = ("q", "k", "v", "log_decay", "bonus", "initial_state")
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
DECODE = (
    Case(name="decode D64", b=1, t=1),
    Case(name="decode D128", b=1, t=1, n=128, p=128),
    Case(name="decode RWKV-6", b=1, t=1, read="before"),
)


@dataclass
class Record:
    """What OUT.json holds."""

    device: str
    versions: tuple[str, ...]
    timings: list[dict[str, Any]] = field(default_factory=list)
    rivals: list[dict[str, Any]] = field(default_factory=list)
    decode: list[dict[str, Any]] = field(default_factory=list)
    host_us: dict[str, float] = field(default_factory=dict)
    tuning: list[dict[str, Any]] = field(default_factory=list)
    launches: dict[str, dict[str, Any]] = field(default_factory=dict)


def device_times(function: Callable[[], object], calls: int = 10) -> dict[str, float]:
    """Milliseconds of every kernel that a call starts."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    return {event.key[:60]: event.device_time_total / 1e3 / calls for event in found.key_averages()}


def called_ms(function: Callable[[], object]) -> float:
    return float(do_bench(function, warmup=10, rep=60, return_mode="median"))


class Timed:
    """A call with its inputs, forward and with gradients."""

    def __init__(self, call: Call, inputs: dict[str, Any]) -> None:
        self.call, self.inputs = call, inputs
        self.wanted = [inputs[name] for name in DIFFERENTIABLE if inputs.get(name) is not None]
        self.pull = torch.randn_like(inputs["v"])

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(self.inputs)

    def both(self) -> tuple[Tensor | None, ...]:
        for tensor in self.wanted:
            tensor.requires_grad_()
        y = self.call(self.inputs)
        found = torch.autograd.grad(y, self.wanted, self.pull, allow_unused=True)
        for tensor in self.wanted:
            tensor.requires_grad_(False)
        return found

    def times(self) -> Iterator[tuple[str, Any]]:
        for name, function in (("forward", self.forward), ("both", self.both)):
            parts = device_times(function)
            yield f"{name}_device_ms", sum(parts.values())
            yield f"{name}_parts", parts
            yield f"{name}_called_ms", called_ms(function)


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
    errors = kernel_errors(OPERATOR, launched(small), arguments, gradients=True)
    tolerance = OPERATOR.tolerances["bfloat16"]
    passed = all(e <= (tolerance.gradient if name.startswith("d_") else tolerance.output) for name, e in errors.items())
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name, passed


def time_case(record: Record, case: Case, launches: Launches | None = None) -> None:
    """Defaults are timed through the torch op; launches that were asked for are timed as kernels alone."""
    row: dict[str, Any] = {"case": asdict(case), "tuned": launches is not None}
    try:
        row["error"], row["error_of"], row["passed"] = check(case, launches or default_launches(case))
        inputs = case.inputs()
        if launches is None:
            row |= dict(Timed(ours, inputs).times())
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
        for part, value in sorted(row["both_parts"].items(), key=lambda item: -item[1])[:8]:
            print(f"          {value:8.3f}  {part}")
    except Exception as error:  # one failure does not lose the rest
        row["failure"] = f"{type(error).__name__}: {error}"[:400]
        print("FAIL", case.name, row["failure"], flush=True)
    record.timings.append(row)


def kernel_times(inputs: dict[str, Any], launches: Launches) -> dict[str, Any]:
    pull = torch.randn_like(inputs["v"])

    def forward() -> tuple[Tensor, ...]:
        return fused.forward(launches, **inputs)

    def both() -> None:
        fused.backward(inputs, forward(), (pull, None), launches)

    found: dict[str, Any] = {}
    for name, function in (("forward", forward), ("both", both)):
        parts = device_times(function)
        found |= {f"{name}_device_ms": sum(parts.values()), f"{name}_parts": parts}
    return found


def time_decode(record: Record) -> None:
    """One token with a state, batch after batch: bytes are those of the state read and written."""
    for case, b in itertools.product(DECODE, (1, 4, 16, 64, 256)):
        inputs = case.inputs(state=True, b=b)
        timed = Timed(ours, inputs)
        size = 2 * inputs["initial_state"].numel() * 4
        row: dict[str, Any] = {"case": case.name, "b": b, "device_us": 1e3 * sum(device_times(timed.forward).values())}
        row["gigabytes_per_s"] = size / row["device_us"] / 1e3
        expected = gated_linear_attention(**inputs, kernel="reference")[0].double()
        row["error"] = float((timed.forward().double() - expected).abs().max() / expected.abs().max())
        print(f"{case.name:12} b={b:<4}", *(f"{name} {row[name]:.3g}" for name in list(row)[2:]), flush=True)
        record.decode.append(row)


def time_host(record: Record) -> None:
    """Microseconds until a call returns, of a shape that the device finishes sooner."""
    case = Case(name="tiny", b=1, t=1_024, h=2)
    inputs = case.inputs()
    timed = Timed(ours, inputs)
    for name, function in {
        "forward": lambda: fused.forward(**inputs), "op forward": timed.forward, "op forward+backward": timed.both
    }.items():  # fmt: skip
        for _ in range(20):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            function()
        record.host_us[name] = (time.perf_counter() - start) / 200 * 1e6
        torch.cuda.synchronize()
    print("host us a call:", {name: round(value, 1) for name, value in record.host_us.items()}, flush=True)


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
            try:
                call = make(case)
                if call is None:
                    continue
                timed = Timed(call, case.inputs())
                mine, theirs = ours(timed.inputs).float(), timed.forward().float()
                row["distance"] = float((mine - theirs).abs().max() / mine.abs().max())
                for key, value in timed.times():
                    row[key] = value
            except Exception as error:
                row["failure"] = f"{type(error).__name__}: {error}"[:200]
        shown = {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}
        print(f"rival {name:36} {case.name:16}", shown, row.get("failure", "")[:90], flush=True)
        record.rivals.append(row)


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
    expected = fused.forward(**inputs)[0].float()

    def measure(trial: Launches, direction: str, shown: str) -> float:
        """Milliseconds of a direction, or of both; infinite where it raises or its result is another."""
        row: dict[str, Any] = {"case": case.name, "direction": direction}
        row["launches"] = {name: asdict(launch) for name, launch in trial.items()}
        try:
            outputs = fused.forward(trial, **inputs)
            distance = float((outputs[0].float() - expected).abs().max() / expected.abs().max())
            functions: dict[str, Callable[[], object]] = {
                "forward": lambda: fused.forward(trial, **inputs),
                "backward": lambda: fused.backward(inputs, outputs, (pull, None), trial),
            }
            times = {
                name: device_times(function) for name, function in functions.items() if direction in (name, "both")
            }
            row |= {"distance": distance, "parts": times, "ms": sum(sum(parts.values()) for parts in times.values())}
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {error}"[:200]
        record.tuning.append(row)
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
    end = time.monotonic() + options.limit_s
    cases = tuple(case for case in CASES if options.only is None or case.name in options.only)
    record = Record(device=torch.cuda.get_device_name(), versions=stack_versions())

    def over(spare_s: float = 15.0) -> bool:
        return bool(time.monotonic() > end - spare_s)

    try:
        for case in cases:
            if over():
                print("time is up: not timed:", case.name)
                continue
            time_case(record, case)
            torch.cuda.empty_cache()
        if not over():
            time_decode(record)
            time_host(record)
        if options.tune:
            for case in cases:
                if over():
                    break
                print("tuning", case.name)
                launches = tune(record, case, over)
                record.launches[case.name] = {name: asdict(launch) for name, launch in launches.items()}
                print("best", *(f"{name}: {launch}" for name, launch in launches.items()), sep="\n  ")
                time_case(record, case, launches)
        time_rivals(record, cases, over)
    finally:
        options.out.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
