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
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from timing import Limit, Record, called_ms, checks, device_parts, show_check, show_parts, surviving

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.delta_rule import fused
from subquad_kernels.delta_rule.definition import sample_inputs
from subquad_kernels.operators import delta_rule
from subquad_kernels.workload import Workload

TOKENS, HEADS = 32_768, 16
SHAPES = ((16, 64), (4, 64), (1, 64), (4, 128), (1, 128))
"""Sequences and width; t = 32,768 / b."""
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


def workload(b: int, t: int, width: int, *, dtype: str = "bfloat16", **others: int) -> Workload:
    shape = {"b": b, "t": t, "h": HEADS, "h_k": HEADS, "n": width, "p": width} | others
    options = {"decay": "scalar", "write_gate": True, "low_rank": False, "initial_state": t == 1}
    return Workload(operator="delta_rule", shape=shape, dtype=dtype, phase="backward", options=options)  # type: ignore[arg-type]


def inputs(case: Workload) -> dict[str, Any]:
    return sample_inputs(case, seed=0, device="cuda")


CHECKED = {
    "t=509 n=p=64": workload(2, 509, 64, h=2, h_k=2),
    "t=509 n=p=128 grouped": workload(1, 509, 128, h=4, h_k=2),
    "t=300 n=p=64 packed": workload(1, 300, 64, h=2, h_k=1, documents=6),
    "t=1 n=p=64": workload(4, 1, 64, h=2, h_k=2),
    "t=300 n=p=64 fp32": workload(1, 300, 64, dtype="float32", h=2, h_k=2),
    "t=300 n=p=128 fp32": workload(1, 300, 128, dtype="float32", h=2, h_k=2),
}


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
            forward = called_ms(lambda: delta_rule(**arguments, kernel="fused"))
        both = called_ms(lambda: torch.autograd.grad(delta_rule(**arguments, kernel="fused")[0], leaves, self.pull))
        return forward, both


def differentiable(arguments: dict[str, Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    names = [name for name in ("q", "k", "v", "log_decay", "write_gate") if arguments[name] is not None]
    leaves = [arguments[name].clone().requires_grad_() for name in names]
    return arguments | dict(zip(names, leaves)), leaves


def rival(record: Record) -> Callable[..., Any] | None:
    """fla's function, where it can be imported."""
    row: dict[str, Any] = {"name": "fla"}
    record.add("rivals", row)
    with surviving(row):  # whatever an import of a stranger's package raises
        module = importlib.import_module("fla.ops.gated_delta_rule")
        row["version"] = str(importlib.import_module("fla").__version__)
        return module.chunk_gated_delta_rule  # type: ignore[no-any-return]
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
        failed: dict[str, Any] = {}
        with surviving(failed):  # fla refuses its backward under some versions of triton
            row[f"{name}_ms"] = sum(device_parts(run).values())
            row[f"{name}_called_ms"] = called_ms(run)
        row |= {f"{name}_{key}": value for key, value in failed.items()}
    return row


def time_all(record: Record, over: Callable[[], bool]) -> None:
    for b, width in SHAPES:
        if over():
            print("time is up: the rest is not timed")
            return
        row: dict[str, Any] = {"b": b, "t": TOKENS // b, "n": width, "p": width}
        record.add("timings", row)
        with surviving(row):
            call = Call(b, width)
            row["launch"] = asdict(fused.launch_of(width, 2))
            row["forward_ms"] = sum(device_parts(call.forward).values())
            row["parts"] = device_parts(call.both)
            row["both_ms"] = sum(row["parts"].values())
            row["forward_called_ms"], row["both_called_ms"] = call.as_called()
        print({name: round(value, 3) for name, value in row.items() if isinstance(value, (int, float))})
        print("     ", row.get("failure", ""))
        show_parts(row.get("parts", {}), most=12)


def time_rivals(record: Record, over: Callable[[], bool]) -> None:
    """Last, as what tunes itself takes its time."""
    theirs = rival(record)
    if theirs is None:
        return
    for row in record.rows.get("timings", ()):
        if over():
            print("time is up: the rest of the rivals is not timed")
            return
        found: dict[str, Any] = {}
        with surviving(found):
            found |= time_rival(theirs, Call(row["b"], row["n"]))
        row["fla"] = found
        print(f"b={row['b']} n={row['n']} fla:", found, flush=True)


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
            with surviving(row):
                call = Call(b, width, launch)
                row["forward_ms"] = sum(device_parts(call.forward).values())
                row["parts"] = device_parts(call.both)
                row["both_ms"] = sum(row["parts"].values())
                if best is None or row["both_ms"] < best[0]:
                    best = row["both_ms"], launch
            shown = (f"{row[name]:8.3f}" for name in ("forward_ms", "both_ms") if name in row)
            print(f"b={b} n={width}", *shown, changed, row.get("failure", "")[:90], flush=True)
            record.add("tuning", row)
        print("fastest:", best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--limit-s", type=float, default=100.0)
    options = parser.parse_args()
    limit, record = Limit(options.limit_s), Record.of("cuda")
    try:
        for row in checks(OPERATOR, KERNEL, CHECKED, "cuda"):
            record.add("checks", row)
            show_check(row)
            if limit.over():
                print("time is up: the rest is not checked")
                break
        time_all(record, limit.over)
        time_rivals(record, limit.over)
        if options.tune:
            tune(record, limit.over)
    finally:
        record.save(options.out)


if __name__ == "__main__":
    main()
