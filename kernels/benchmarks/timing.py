"""What the benchmark scripts share: times of a device and of a caller, rows that outlive failures, a limit, the record.

Imported by the scripts beside it:  python kernels/benchmarks/NAME.py
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad_kernels.catalogue import Kernel, Operator
from subquad_kernels.self_check import judge, kernel_errors, stack_versions
from subquad_kernels.workload import Workload

Function = Callable[[], object]


@dataclass
class Record:
    """What OUT.json holds: lists of rows by name, on which device and versions they were taken.

    With a path it is written at every row, so that whoever ends the script loses one row at most.
    """

    device: str
    versions: tuple[str, ...]
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def of(cls, device: str, path: Path | None = None) -> Record:
        """An empty record of this machine."""
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        return cls(name, stack_versions(), path=path)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row under a name."""
        self.rows.setdefault(name, []).append(row)
        if self.path is not None:
            self.save(self.path)

    def save(self, path: Path) -> None:
        """Write what there is so far: {"device", "versions", NAME: rows ...}."""
        found = {"device": self.device, "versions": self.versions} | self.rows
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")


class Limit:
    """Time is up after `seconds`: what is left is skipped, and said so."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def over(self, spare_s: float = 0.0) -> bool:
        """Whether fewer than `spare_s` seconds are left."""
        return time.monotonic() > self._end - spare_s


@contextmanager
def surviving(row: dict[str, Any]) -> Iterator[None]:
    """One failure does not lose the rest: it is written to its row."""
    try:
        yield
    except Exception as error:
        row["failure"] = f"{type(error).__name__}: {error}"[:400]


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def device_parts(function: Function, calls: int = 10) -> dict[str, float]:
    """Milliseconds of every kernel that a call starts, by the profiler, the mean of several calls."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    return {event.key[:60]: event.device_time_total / 1e3 / calls for event in found.key_averages()}


def called_ms(function: Function) -> float:
    """What a caller waits for: median, L2 cleared between calls."""
    from triton.testing import do_bench

    return float(do_bench(function, warmup=10, rep=50, return_mode="median"))


def seconds(function: Function, device: str, calls: int = 3) -> float:
    """The least of several calls, each waited for."""
    function()
    times = []
    for _ in range(calls):
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def graph_us(functions: Sequence[Function], device: str, replays: int = 20) -> float:
    """Microseconds of one function where all run one after the other, by a CUDA graph; on a CPU simply called.

    Where the functions' inputs together are larger than L2, each finds it cold; results have memory of their own too.
    """

    def everything() -> list[object]:
        return [function() for function in functions]

    if device != "cuda":
        return 1e6 * seconds(everything, device) / len(functions)
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):  # compiles and fills caches, as a capture wants
        functions[0]()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = everything()
    times = []
    for _ in range(replays + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    del results
    return float(1e3 * statistics.median(times[2:]) / len(functions))


def host_us(function: Function, calls: int = 200) -> float:
    """Microseconds until a call returns, of a shape that the device finishes sooner."""
    for _ in range(20):
        function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    found = (time.perf_counter() - begin) / calls * 1e6
    torch.cuda.synchronize()
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|"""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def checks(operator: Operator, kernel: Kernel, cases: Mapping[str, Workload], device: str) -> Iterator[dict[str, Any]]:
    """Small sizes: outputs and every gradient against float64, within the operator's tolerances."""
    for name, case in cases.items():
        row: dict[str, Any] = {"case": name, "against": "float64 reference", "passed": False}
        with surviving(row):
            arguments = operator.torch_half.sample_inputs(case, seed=0, device=device)
            row["errors"] = kernel_errors(operator, kernel, arguments, gradients=True)
            row["passed"] = judge(operator, kernel, case, row["errors"]).passed
        yield row


def comparison(
    case: str, against: str, pairs: Callable[[], Iterable[tuple[str, Tensor, Tensor]]], allowed: float
) -> dict[str, Any]:
    """Results by name, ours and a rival's at full size: their distances, all of which are allowed."""
    row: dict[str, Any] = {"case": case, "against": against, "passed": False}
    with surviving(row):
        row["errors"] = {name: distance(mine, theirs) for name, mine, theirs in pairs()}
        row["passed"] = all(error <= allowed for error in row["errors"].values())
    return row


def show_check(row: Mapping[str, Any]) -> None:
    """One line: what passed, and its largest error."""
    name, error = max(row.get("errors", {"": math.nan}).items(), key=lambda item: item[1])
    state = "ok  " if row["passed"] else "FAIL"
    print(f"{state} {row['case']} against {row['against']}: {name} {error:.1e} {row.get('failure', '')}", flush=True)


def show_parts(parts: Mapping[str, float], most: int = 8) -> None:
    """The kernels that take the longest."""
    for name, value in sorted(parts.items(), key=lambda item: -item[1])[:most]:
        print(f"      {value:8.3f}  {name}", flush=True)


class Timed:
    """A function of arguments and its inputs: forward as it is, and with the gradients of all floating inputs."""

    def __init__(self, call: Callable[[dict[str, Any]], Tensor], inputs: dict[str, Any]) -> None:
        self.call, self.inputs = call, inputs
        self.wanted = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
        self._pull: Tensor | None = None

    def forward(self) -> Tensor:
        """Without autograd."""
        with torch.no_grad():
            return self.call(self.inputs)

    def both(self) -> tuple[Tensor | None, ...]:
        """Forward and backward."""
        for tensor in self.wanted:
            tensor.requires_grad_()
        y = self.call(self.inputs)
        if self._pull is None:
            self._pull = torch.randn_like(y)
        found = torch.autograd.grad(y, self.wanted, self._pull, allow_unused=True)
        for tensor in self.wanted:
            tensor.requires_grad_(False)
        return found

    def times(self) -> Iterator[tuple[str, Any]]:
        """Device time, its parts, and what a caller waits for; of the forward, then of both."""
        for name, function in (("forward", self.forward), ("both", self.both)):
            parts = device_parts(function)
            yield f"{name}_device_ms", sum(parts.values())
            yield f"{name}_parts", parts
            yield f"{name}_called_ms", called_ms(function)
