"""Check and time the fused delta rule on a CUDA device.

    python kernels/benchmarks/delta_rule.py OUT.json [--tune] [--limit-s 100]

32,768 tokens of 16 heads (n = p = 64 or 128) in bfloat16, with decay and write gate. Device time is the sum of all
kernels of a call under the profiler; `called` is the median of `triton.testing.do_bench` (L2 cleared between calls),
host included; `parts` are the kernels of one forward and backward. A rival, `fla.ops.gated_delta_rule`, is timed
afterwards where it can be imported. Nothing new begins after --limit-s seconds. With --tune, launches that differ from
the package's own in one choice are timed, and the fastest of each choice is named; the package itself keeps what
`fused.launch_of` says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.delta_rule import fused
from subquad_kernels.delta_rule.definition import sample_inputs
from subquad_kernels.operators import delta_rule
from subquad_kernels.self_check import judge, kernel_errors, stack_versions
from subquad_kernels.workload import Workload

TOKENS, HEADS = 32_768, 16
SHAPES = ((16, 64), (4, 64), (1, 64), (4, 128), (1, 128))
"""Sequences and width; t = 32,768 / b."""
DECODES = (1, 16, 64, 256)
OPERATOR = CATALOGUE.operator("delta_rule")
KERNEL = CATALOGUE.kernel("delta_rule", "fused")

CHOICES: dict[str, tuple[Any, ...]] = {
    "scan_tile_p": (16, 32, 64, 128),
    "scan_warps": (1, 2, 4, 8),
    "scan_stages": (1, 2, 3, 4),
    "scan_back_stages": (1, 2, 3),
    "read_tile_p": (32, 64, 128),
    "read_warps": (2, 4, 8),
    "invert_warps": (1, 2, 4),
    "differentiate_tile_p": (32, 64, 128),
    "differentiate_warps": (4, 8),
}
PAIRS: tuple[dict[str, int], ...] = (
    {"scan_tile_p": 16, "scan_warps": 1},
    {"scan_tile_p": 32, "scan_warps": 2},
    {"scan_tile_p": 32, "scan_warps": 1},
    {"scan_tile_p": 128, "scan_warps": 8},
    {"scan_tile_p": 64, "scan_warps": 8},
    {"differentiate_tile_p": 128, "differentiate_warps": 8},
)


@dataclass
class Record:
    """What OUT.json holds."""

    device: str
    versions: tuple[str, ...]
    rivals: dict[str, str] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    decodes: list[dict[str, Any]] = field(default_factory=list)
    tuning: list[dict[str, Any]] = field(default_factory=list)


def workload(b: int, t: int, width: int, *, dtype: str = "bfloat16", **others: int) -> Workload:
    shape = {"b": b, "t": t, "h": HEADS, "h_k": HEADS, "n": width, "p": width} | others
    options = {"decay": "scalar", "write_gate": True, "low_rank": False, "initial_state": t == 1}
    return Workload(operator="delta_rule", shape=shape, dtype=dtype, phase="backward", options=options)  # type: ignore[arg-type]


def inputs(case: Workload) -> dict[str, Any]:
    return sample_inputs(case, seed=0, device="cuda")


def milliseconds(function: Callable[[], object]) -> float:
    return float(do_bench(function, warmup=10, rep=50, return_mode="median"))


def device_parts(function: Callable[[], object], calls: int = 5) -> dict[str, float]:
    """Milliseconds of each kernel in one call, the mean of several."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    return {event.key[:60]: event.device_time_total / 1e3 / calls for event in found.key_averages()}


def checks() -> Iterator[dict[str, Any]]:
    """Small sizes: outputs and every gradient against float64."""
    cases = {
        "t=509 n=p=64": workload(2, 509, 64, h=2, h_k=2),
        "t=509 n=p=128 grouped": workload(1, 509, 128, h=4, h_k=2),
        "t=300 n=p=64 packed": workload(1, 300, 64, h=2, h_k=1, documents=6),
        "t=1 n=p=64": workload(4, 1, 64, h=2, h_k=2),
        "t=300 n=p=64 fp32": workload(1, 300, 64, dtype="float32", h=2, h_k=2),
        "t=300 n=p=128 fp32": workload(1, 300, 128, dtype="float32", h=2, h_k=2),
    }
    for name, case in cases.items():
        row: dict[str, Any] = {"case": name}
        try:
            row["errors"] = kernel_errors(OPERATOR, KERNEL, inputs(case), gradients=True)
            row["passed"] = judge(OPERATOR, KERNEL, case, row["errors"]).passed
        except Exception as error:  # one failure does not lose the rest
            row |= {"passed": False, "failure": f"{type(error).__name__}: {error}"[:400]}
        yield row


class Call:
    """One call, as kernels alone and as a user makes it."""

    def __init__(self, b: int, width: int, launch: fused.Launch | None = None) -> None:
        self.arguments = inputs(workload(b, TOKENS // b, width))
        self.launch = launch
        self.outputs = fused.forward(launch, **self.arguments)
        self.pull = torch.randn_like(self.arguments["v"])

    def forward(self) -> None:
        fused.forward(self.launch, **self.arguments)

    def both(self) -> None:
        outputs = fused.forward(self.launch, **self.arguments)
        fused.backward(self.arguments, outputs, (self.pull, None), self.launch)

    def as_called(self) -> tuple[float, float]:
        """Forward, and forward with backward, through the operator and autograd."""
        arguments, leaves = differentiable(self.arguments)
        with torch.no_grad():
            forward = milliseconds(lambda: delta_rule(**arguments, kernel="fused"))
        both = milliseconds(lambda: torch.autograd.grad(delta_rule(**arguments, kernel="fused")[0], leaves, self.pull))
        return forward, both


def differentiable(arguments: dict[str, Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    names = [name for name in ("q", "k", "v", "log_decay", "write_gate") if arguments[name] is not None]
    leaves = [arguments[name].clone().requires_grad_() for name in names]
    return arguments | dict(zip(names, leaves)), leaves


def rival(record: Record) -> Callable[..., Any] | None:
    try:
        module = importlib.import_module("fla.ops.gated_delta_rule")
        record.rivals["fla"] = str(importlib.import_module("fla").__version__)
        return module.chunk_gated_delta_rule  # type: ignore[no-any-return]
    except Exception as error:  # whatever an import of a stranger's package raises
        record.rivals["fla"] = f"absent ({type(error).__name__}: {error})"[:200]
        return None


def time_rival(function: Callable[..., Any], call: Call) -> dict[str, Any]:
    arguments, leaves = differentiable(call.arguments)

    def forward() -> Any:
        return function(
            arguments["q"], arguments["k"], arguments["v"], arguments["log_decay"], arguments["write_gate"],
            scale=arguments["scale"],
        )[0]  # fmt: skip

    row: dict[str, Any] = {}
    for name, run in (("forward", forward), ("both", lambda: torch.autograd.grad(forward(), leaves, call.pull))):
        try:
            row[f"{name}_ms"] = sum(device_parts(run).values())
            row[f"{name}_called_ms"] = milliseconds(run)
        except Exception as error:  # fla refuses its backward under some versions of triton
            row[f"{name}_failure"] = f"{type(error).__name__}: {error}"[:200]
    return row


def time_all(record: Record, over: Callable[[], bool]) -> None:
    for b, width in SHAPES:
        row: dict[str, Any] = {"b": b, "t": TOKENS // b, "n": width, "p": width}
        record.timings.append(row)
        if over():
            row["failure"] = "time is up"
            continue
        try:
            call = Call(b, width)
            row["launch"] = asdict(fused.launch_of(width, 2))
            row["forward_ms"] = sum(device_parts(call.forward).values())
            row["parts"] = device_parts(call.both)
            row["both_ms"] = sum(row["parts"].values())
            row["forward_called_ms"], row["both_called_ms"] = call.as_called()
            print({name: round(value, 3) for name, value in row.items() if isinstance(value, (int, float))})
            for name, value in sorted(row["parts"].items(), key=lambda item: -item[1])[:12]:
                print(f"      {value:8.3f}  {name}", flush=True)
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {error}"[:400]
            print(row, flush=True)


def time_rivals(record: Record, over: Callable[[], bool]) -> None:
    """Last, as what tunes itself takes its time."""
    theirs = rival(record)
    for row in record.timings if theirs is not None else ():
        if over():
            print("time is up: the rest of the rivals is not timed")
            return
        try:
            row["fla"] = time_rival(theirs, Call(row["b"], row["n"]))
        except Exception as error:
            row["fla"] = {"failure": f"{type(error).__name__}: {error}"[:200]}
        print(f"b={row['b']} n={row['n']} fla:", row["fla"], flush=True)


def time_decodes(record: Record, over: Callable[[], bool]) -> None:
    """One token of `b` sequences: milliseconds of the kernel, and bytes of state read and written a second."""
    for b in DECODES:
        if over():
            print("time is up: the rest is not decoded")
            return
        row: dict[str, Any] = {"b": b}
        try:
            arguments = inputs(workload(b, 1, 128))
            row["ms"] = sum(device_parts(partial(fused.forward, None, **arguments), 20).values())
            row["called_ms"] = milliseconds(partial(delta_rule, **arguments, kernel="fused"))
            row["gigabytes_s"] = 2 * 4 * b * HEADS * 128 * 128 / row["ms"] / 1e6
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {error}"[:400]
        print(row, flush=True)
        record.decodes.append(row)


def tune(record: Record, over: Callable[[], bool]) -> None:
    """Forward and forward with backward, device time, for launches one choice or one pair away from the package's."""
    for b, width in SHAPES[1:4]:
        base = fused.launch_of(width, 2)
        tried = [replace(base, **{name: value}) for name, values in CHOICES.items() for value in values]
        tried += [replace(base, **pair) for pair in PAIRS]
        best: tuple[float, fused.Launch] | None = None
        for launch in dict.fromkeys([base, *tried]):
            if over():
                print("time is up: the rest is not tuned")
                return
            changed = {name: value for name, value in asdict(launch).items() if value != getattr(base, name)}
            row: dict[str, Any] = {"b": b, "width": width, "changed": changed}
            try:
                call = Call(b, width, launch)
                row["forward_ms"] = sum(device_parts(call.forward).values())
                row["parts"] = device_parts(call.both)
                row["both_ms"] = sum(row["parts"].values())
                if best is None or row["both_ms"] < best[0]:
                    best = row["both_ms"], launch
                print(f"b={b} n={width} {row['forward_ms']:8.3f} {row['both_ms']:8.3f}  {changed}", flush=True)
            except Exception as error:
                row["failure"] = f"{type(error).__name__}: {error}"[:200]
                print(f"b={b} n={width} {changed} {row['failure'][:90]}", flush=True)
            record.tuning.append(row)
        print("fastest:", best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--limit-s", type=float, default=100.0)
    options = parser.parse_args()
    end = time.monotonic() + options.limit_s

    def over() -> bool:
        return time.monotonic() > end

    record = Record(device=torch.cuda.get_device_name(), versions=stack_versions())
    try:
        for row in checks():
            record.checks.append(row)
            worst = max(row.get("errors", {"": 0.0}).items(), key=lambda item: item[1])
            print("ok  " if row["passed"] else "FAIL", row["case"], worst, row.get("failure", ""), flush=True)
            if over():
                print("time is up: the rest is not checked")
                break
        time_all(record, over)
        time_decodes(record, over)
        time_rivals(record, over)
        if options.tune:
            tune(record, over)
    finally:
        options.out.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
