"""Choose the launches of linear attention whose heads share keys (SSD), on a CUDA device, beside those that do not.

    python kernels/benchmarks/shared_keys.py OUT.json [--limit-s 115]

32 heads over one of q and k, n = 128, p = 64, decay and write gate by token, 32,768 tokens, bfloat16. First, all in
processes of their own: small cases against float64, outputs and every gradient, and what is to be tried is compiled.
Then device time (profiler, mean of ten calls) of heads one by one, and of several a program: from the package's sizes
on, those of one kernel after the other are tried, and the fastest kept; what stands at the end is printed as the
package writes it. A launch counts only where its results are near those of heads one by one. OUT.json is written at
every row.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from timing import Limit, Record, device_parts, distance, show_check, show_parts, surviving

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.linear_attention import fused
from subquad_kernels.linear_attention.chunk_states import Size
from subquad_kernels.linear_attention.definition import empty_outputs, sample_inputs
from subquad_kernels.linear_attention.launches import Launch
from subquad_kernels.self_check import judge, kernel_errors
from subquad_kernels.workload import Workload

OPERATOR, KERNEL = CATALOGUE.operator("linear_attention"), CATALOGUE.kernel("linear_attention", "fused")
LENGTHS = (8_192, 32_768)
TOKENS = 32_768
TRIED: tuple[tuple[str, str, tuple[tuple[int, int, int | None], ...]], ...] = (
    ("forward", "states", ((8, 2, 128), (8, 2, None), (8, 3, 128), (4, 2, None))),
    ("forward", "read", ((8, 2, None), (8, 1, None), (8, 3, None))),
    ("chunks of 64", "states", ((8, 2, 80), (8, 3, 80), (8, 2, 128), (4, 2, 168), (4, 3, 168))),
    ("chunks of 64", "read", ((4, 2, None), (4, 1, None), (4, 1, 168), (4, 2, 168), (4, 3, None))),
    ("backward", "borders", ((8, 2, 80), (8, 3, 80), (8, 2, 128), (4, 2, 168), (4, 3, 168))),
    ("backward", "states", ((8, 2, 80), (8, 3, 80), (8, 2, 128), (4, 2, 168), (4, 3, 168))),
    ("backward", "queries", ((4, 2, None), (8, 2, None), (8, 2, 128), (8, 1, 128), (8, 3, None), (4, 1, None))),
    ("backward", "keys", ((4, 2, None), (4, 3, None), (4, 1, None), (4, 2, 168), (8, 2, None), (8, 2, 128))),
)
"""Of each kernel: warps, stages of loads, a cap on registers."""
HEADS = (4, 16, 32)
"""A program takes, besides what stands."""

CHECKS: dict[str, dict[str, Any]] = {
    "SSD": {},
    "diagonal, states": {"diagonal": True, "initial_state": True},
    "packed": {"documents": 5},
    "packed, diagonal, states": {"documents": 5, "diagonal": True, "initial_state": True},
    "n 64, decay by head": {"n": 64, "decay": "head"},
    "n 64, packed, no decay": {"n": 64, "decay": "none", "documents": 3},
    "two sequences, two groups, p 48": {"b": 2, "h": 16, "h_k": 2, "p": 48},
}  # fmt: skip


def workload(t: int, b: int | None = None, **changes: Any) -> Workload:
    shape = {"b": b or TOKENS // t, "t": t, "h": 32, "h_k": 1, "n": 128, "p": 64}
    options: dict[str, Any] = {"decay": "token", "write_gate": True, "diagonal": False, "initial_state": False}
    shape |= {name: value for name, value in changes.items() if name not in options}
    options |= {name: value for name, value in changes.items() if name in options}
    return Workload(operator="linear_attention", shape=shape, dtype="bfloat16", phase="backward", options=options)


def check(name: str) -> dict[str, Any]:
    """A small case in two segments with the package's own launches; float64 keeps the states of all its tokens."""
    case = workload(331, **({"b": 1} | CHECKS[name]))
    errors = kernel_errors(OPERATOR, KERNEL, sample_inputs(case, seed=0, device="cuda"), gradients=True)
    verdict = judge(OPERATOR, KERNEL, case, errors)
    row = {"case": name, "against": "float64 reference", "errors": errors, "passed": verdict.passed}
    return row | ({} if verdict.passed else {"failure": verdict.reason})


def own_launches() -> dict[str, Launch]:
    """What stands, and the forward in chunks of 64, as packed documents have it."""
    return {
        "forward": fused.shared_launch(backward=False, packed=False),
        "chunks of 64": fused.shared_launch(backward=False, packed=True),
        "backward": fused.shared_launch(backward=True, packed=False),
    }


def changed(launch: Launch, **changes: Any) -> Launch:
    assert launch.shared is not None
    return replace(launch, shared=replace(launch.shared, **changes))


def old_launches() -> dict[str, Launch]:
    """Heads one by one."""
    return {
        direction: fused.launch_of(128, 64, torch.bfloat16, backward=direction == "backward")
        for direction in ("forward", "backward")
    }


class Calls:
    """A shape's inputs, and its two directions with a launch; the backward's outputs are those of `run`, or nothing."""

    def __init__(self, t: int, b: int | None = None, *, run: bool = True) -> None:
        self.inputs = sample_inputs(workload(t, b), seed=0, device="cuda")
        self.pull = torch.randn_like(self.inputs["v"])
        self.outputs = tuple(map(torch.zeros_like, empty_outputs(self.inputs)))
        if run:
            self.outputs = self.forward(old_launches()["forward"])

    def forward(self, launch: Launch) -> tuple[torch.Tensor, ...]:
        return fused.forward(launch, **self.inputs)

    def backward(self, launch: Launch) -> tuple[torch.Tensor, ...]:
        found = fused.backward(self.inputs, self.outputs, (self.pull, None), launch)
        return tuple(gradient for gradient in found.values() if gradient is not None)

    def run(self, direction: str, launch: Launch) -> tuple[torch.Tensor, ...]:
        return self.backward(launch) if direction == "backward" else self.forward(launch)


def compile_one(direction: str, launch: Launch) -> float:
    """Leave what a direction launches in triton's cache on disk; lengths are not part of it. Seconds."""
    begin = time.monotonic()
    Calls(1_024, 1, run=False).run(direction, launch)
    torch.cuda.synchronize()
    return time.monotonic() - begin


def tried_of(direction: str) -> Iterator[tuple[str, Size]]:
    """Each kernel of a direction, and the sizes to try."""
    for where, kernel, sizes in TRIED:
        if where == direction:
            yield from ((kernel, Size(num_warps=w, num_stages=s, registers=cap)) for w, s, cap in sizes)


class Tuning:
    """The launches that stand, and what was compiled for trying."""

    def __init__(self, record: Record, limit: Limit, pool: ProcessPoolExecutor) -> None:
        self.record, self.limit, self.pool = record, limit, pool
        self.launches = own_launches()
        self.calls: Calls | None = None
        self.expected: dict[str, tuple[torch.Tensor, ...]] = {}
        self.compiling: dict[tuple[str, Launch], Future[float]] = {}

    def compile(self, direction: str, launch: Launch) -> None:
        if (direction, launch) not in self.compiling:
            self.compiling[direction, launch] = self.pool.submit(compile_one, direction, launch)

    def compiled(self) -> None:
        """Wait for all: what they run would be in the times."""
        wait(self.compiling.values())

    def measure(self, direction: str, launch: Launch, label: str) -> float:
        """Device milliseconds; infinite where it does not compile or run, or its results are others."""
        row: dict[str, Any] = {"direction": direction, "label": label, "launch": repr(launch)}
        with surviving(row):
            if (direction, launch) in self.compiling:
                row["compile_s"] = self.compiling[direction, launch].result()
            if self.calls is None:
                self.calls = Calls(LENGTHS[0])
            calls, plain = self.calls, "backward" if direction == "backward" else "forward"
            if plain not in self.expected:
                self.expected[plain] = calls.run(plain, old_launches()[plain])
            pairs = zip(calls.run(direction, launch), self.expected[plain], strict=True)
            row["distance"] = max(distance(mine, other) for mine, other in pairs if mine.numel())
            row["parts"] = device_parts(lambda: calls.run(direction, launch))
            row["ms"] = sum(row["parts"].values())
            if row["distance"] > 0.05:
                row["failure"] = f"results are {row['distance']:.1e} apart"
        self.record.add("tuning", row)
        shown = f"{row.get('ms', 0):.3f} ms   apart {row.get('distance', 0):.1e}   {row.get('failure', '')[:120]}"
        print(f"  {direction:12} {label:66} {shown}", flush=True)
        return float("inf") if "failure" in row else float(row["ms"])

    def choose(self, direction: str, least: float, tried: list[tuple[str, Launch]]) -> float:
        """Keep the fastest of those tried, where it is faster than what stands."""
        for label, launch in tried:
            if self.limit.over(20.0):
                print("time is up: the rest is not tried")
                break
            found = self.measure(direction, launch, label)
            if found < least:
                least, self.launches[direction] = found, launch
        return least


def tune(tuning: Tuning) -> dict[str, Launch]:
    """One kernel after the other, then the heads of a program; the launches of both directions, and what packed is."""
    own = dict(tuning.launches)
    fastest = {}
    for direction in ("backward", "forward", "chunks of 64"):
        least = tuning.measure(direction, own[direction], "as the package has it")
        show_parts(tuning.record.rows["tuning"][-1].get("parts", {}))
        for kernel, sizes in groupby(tried_of(direction), key=itemgetter(0)):
            standing = tuning.launches[direction]
            tried = [(f"{kernel} {size}", changed(standing, **{kernel: size})) for _, size in sizes]
            least = tuning.choose(direction, least, [entry for entry in tried if entry[1] != standing])
        fastest[direction] = least
    several = {
        direction: [(f"heads {heads}", changed(tuning.launches[direction], heads=heads)) for heads in HEADS]
        for direction in tuning.launches
    }
    if fastest["forward"] <= fastest["chunks of 64"]:
        del several["chunks of 64"]
    for direction, tried in several.items():
        for _, launch in tried:
            tuning.compile(direction, launch)
    tuning.compiled()
    for direction, tried in several.items():
        fastest[direction] = tuning.choose(direction, fastest[direction], tried)
    forward = min(("forward", "chunks of 64"), key=fastest.__getitem__)
    print(f"the forward is faster in {'chunks of 128' if forward == 'forward' else forward}")
    return tuning.launches | {"forward": tuning.launches[forward]}


def time_both(record: Record, t: int, label: str, launches: dict[str, Launch]) -> None:
    """Device time of a forward, and of it with the backward; launches of the backward on the forward's own residual."""
    row: dict[str, Any] = {"t": t, "label": label, "launches": {name: repr(value) for name, value in launches.items()}}
    with surviving(row):
        calls = Calls(t)
        for direction in ("forward", "backward"):
            row[f"{direction}_parts"] = device_parts(partial(calls.run, direction, launches[direction]))
            row[f"{direction}_ms"] = sum(row[f"{direction}_parts"].values())
        both = row["forward_ms"] + row["backward_ms"]
        print(f"t {t:6} {label:24} forward {row['forward_ms']:.3f}   forward + backward {both:.3f}", flush=True)
        for direction in ("forward", "backward"):
            show_parts({name: value for name, value in row[f"{direction}_parts"].items() if value > 1e-3}, most=12)
    if "failure" in row:
        print("FAIL", t, label, row["failure"], flush=True)
    record.add("timings", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit-s", type=float, default=115.0)
    options = parser.parse_args()
    limit = Limit(options.limit_s)
    record = Record.of("cuda", options.out)
    workers = min(14, os.cpu_count() or 1)
    with ProcessPoolExecutor(max_workers=workers, mp_context=get_context("spawn")) as pool:
        tuning = Tuning(record, limit, pool)
        checks = {name: pool.submit(check, name) for name in CHECKS}
        own = dict(tuning.launches)
        for direction, launch in (*own.items(), *old_launches().items()):
            tuning.compile(direction, launch)
        for direction, launch in own.items():
            for kernel, size in tried_of(direction):
                tuning.compile(direction, changed(launch, **{kernel: size}))
        for name, found in checks.items():
            row: dict[str, Any] = {"case": name, "against": "float64 reference", "passed": False}
            with surviving(row):
                row = found.result()
            record.add("checks", row)
            show_check(row)
        tuning.compiled()
        for t in LENGTHS:
            time_both(record, t, "heads one by one", old_launches())
            time_both(record, t, "several, as they stand", own)
        launches = tune(tuning)
        print("fastest", *(f"{name}: {launch}" for name, launch in launches.items()), sep="\n  ", flush=True)
        record.add("fastest", {name: repr(launch) for name, launch in launches.items()})
        for t in LENGTHS:
            time_both(record, t, "several, the fastest", launches)


if __name__ == "__main__":
    main()
