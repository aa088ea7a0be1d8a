"""Check and time the fused causal convolution on a CUDA device.

    python kernels/benchmarks/causal_conv.py OUT.json [--tune] [--limit-s 100]

Times are device times (median of `triton.testing.do_bench`, L2 cleared between calls) of 32,768 tokens, 2048 channels
and 4 taps in bfloat16, with bias and SiLU; `parts` are those of each kernel in one forward and backward.
With --tune, each direction is first tried under a grid of launches, and the best stay for the timings; the package
itself keeps what `fused.launch_of` says.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Limit, Record, called_ms, checks, comparison, device_parts, show_check, show_parts, surviving
from torch import Tensor

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.causal_conv import fused
from subquad_kernels.causal_conv.definition import sample_inputs
from subquad_kernels.workload import Workload

TOKENS, CHANNELS, TAPS, BATCHES = 32_768, 2_048, 4, (16, 4, 1)
OPERATOR = CATALOGUE.operator("causal_conv")
KERNEL = CATALOGUE.kernel("causal_conv", "fused")

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


def workload(b: int, t: int, *, c: int = CHANNELS, w: int = TAPS, state: bool = False, **others: int) -> Workload:
    shape = {"b": b, "t": t, "c": c, "w": w} | others
    return Workload(
        operator="causal_conv", shape=shape, dtype="bfloat16", phase="backward",
        options={"activation": "silu", "bias": True, "initial_state": state},
    )  # fmt: skip


def inputs(case: Workload) -> dict[str, Any]:
    return sample_inputs(case, seed=0, device="cuda")


CHECKED = {
    "t=509": workload(2, 509, c=160, state=True),
    "t=300 packed": workload(1, 300, c=96, state=True, documents=6),
    "t=300 w=7": workload(1, 300, c=77, w=7),
    "t=1": workload(4, 1, c=256, state=True),
}


def check_against_conv1d() -> Iterator[dict[str, Any]]:
    """bfloat16 at larger sizes, against the library's convolution, relative to its largest value."""
    for b, t, c in ((16, 2_048, 2_048), (1, 4_096, 512)):

        def pairs(b: int = b, t: int = t, c: int = c) -> Iterator[tuple[str, Tensor, Tensor]]:
            arguments = inputs(workload(b, t, c=c))
            pull = torch.randn_like(arguments["x"])
            mine, theirs = (results(kernel, arguments, pull) for kernel in ("fused", "conv1d"))
            return ((name, mine[name], theirs[name]) for name in mine)

        yield comparison(f"b={b} t={t} c={c}", "conv1d", pairs, 1.6e-2)


def results(kernel: str, arguments: dict[str, Any], pull: Tensor) -> dict[str, Tensor]:
    """y and every gradient by name, without autograd."""
    functions = CATALOGUE.kernel("causal_conv", kernel).torch_half
    outputs = functions.forward(**arguments)
    found = functions.backward(arguments, outputs, (pull, None))
    return {"y": outputs[0]} | {f"d_{name}": value for name, value in found.items() if value is not None}


class Directions:
    """Forward and backward of one call, each under a launch."""

    def __init__(self, b: int) -> None:
        self.b = b
        self.arguments = inputs(workload(b, TOKENS // b))
        self.outputs = fused.forward(**self.arguments)
        self.pull = torch.randn_like(self.arguments["x"])

    def time(self, direction: str, launch: fused.Launch) -> float:
        if direction == "forward":
            return called_ms(lambda: fused.forward(**self.arguments, launch=launch))
        return called_ms(lambda: fused.backward(self.arguments, self.outputs, (self.pull, None), launch))

    def both(self, launches: dict[str, fused.Launch]) -> None:
        outputs = fused.forward(**self.arguments, launch=launches["forward"])
        fused.backward(self.arguments, outputs, (self.pull, None), launches["backward"])


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
        with surviving(row):
            row["ms"] = [case.time(direction, launch) for case in cases]
            if best is None or sum(row["ms"]) < best[0]:
                best = sum(row["ms"]), launch
        shown = (f"{value:8.3f}" for value in row.get("ms", ()))
        print(f"{direction:8} {label:48}", *shown, row.get("failure", "")[:80], flush=True)
        record.add("tuning", row)
    return None if best is None else best[1]


def time_all(record: Record, launches: dict[str, fused.Launch]) -> None:
    for b in BATCHES:
        row: dict[str, Any] = {"b": b, "t": TOKENS // b}
        with surviving(row):
            case = Directions(b)
            row["forward_ms"] = case.time("forward", launches["forward"])
            row["backward_ms"] = case.time("backward", launches["backward"])
            row["both_ms"] = called_ms(partial(case.both, launches))
            row["parts"] = device_parts(partial(case.both, launches))
        shown = (f"{name} {row[name]:.3f}" for name in row if name.endswith("_ms"))
        print(f"b={b:<3} t={TOKENS // b:<6}", *shown, row.get("failure", ""))
        show_parts(row.get("parts", {}))
        record.add("timings", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--limit-s", type=float, default=100.0)
    options = parser.parse_args()
    limit, record = Limit(options.limit_s), Record.of("cuda")
    launches = {
        name: fused.launch_of(TOKENS, CHANNELS, TAPS, backward=name == "backward") for name in ("forward", "backward")
    }
    try:
        for row in (*checks(OPERATOR, KERNEL, CHECKED, "cuda"), *check_against_conv1d()):
            record.add("checks", row)
            show_check(row)
        time_all(record, launches)
        if options.tune:
            tune(record, launches, lambda: limit.over(15))
            print({name: str(launch) for name, launch in launches.items()})
            time_all(record, launches)
    finally:
        record.add("launches", {name: asdict(launch) for name, launch in launches.items()})
        record.save(options.out)



if __name__ == "__main__":
    main()
