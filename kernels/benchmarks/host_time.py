"""Time what a call of an operator costs the host: Python, dispatcher and autograd, without the work of the device.

    python kernels/benchmarks/host_time.py [--repeats 2000] [--json OUT.json] [--only OPERATOR ...] [--forward]

A number is the wall time, in microseconds, of one call that begins with an idle device and is not waited for: the least
median of twenty groups of calls.
Four of them for every operator, packed and not; with --forward the first alone:

    op            the operator in torch.no_grad()
    op+grad       the operator where autograd records it
    op+backward   the same, and torch.autograd.grad of every floating argument
    kernel        the kernel's own forward, then its backward, called directly: the part that is not the operator's,
                  as a first call of the operator takes it; later ones replay it

On any machine:    `nothing` is a kernel that allocates its results and computes none: what is left is the operator's.
                   `unlaunched` is the operator's Triton kernel with its launches left out (tensors on the CPU):
                   what is left is the Python that prepares them.
On a CUDA device:  `launched` is the operator's Triton kernel as it is, `unsent` the same up to where a compiled kernel
                   is handed to triton's launcher. A line after them says where the time of a forward goes: the
                   operator, what else the host does, and the launches, of which it names the number, and that of
                   torch's own operations.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import subquad_kernels.operators
from subquad_kernels.builtin import OPERATORS
from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.replay import Recording
from subquad_kernels.self_check import stack_versions
from subquad_kernels.triton_launch import QuickLaunch
from subquad_kernels.workload import DeviceLimits, Workload

LIMITS = DeviceLimits(kind="cuda", name="any", capability=(9, 0))
SIZES = {"b": 2, "t": 256, "s": 256, "h": 4, "h_kv": 4, "k": 64, "v": 64, "c": 256}


class Nothing:
    """Results of the right shapes, and nothing computed."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    def forward(self, **arguments: Any) -> tuple[Tensor, ...]:
        return self._operator.torch_half.empty_outputs(arguments)

    def backward(self, arguments: Any, outputs: Any, gradients: Any) -> dict[str, Tensor | None]:
        return {
            name: torch.empty_like(value)
            for name in self._operator.tensors
            if isinstance(value := arguments[name], Tensor) and value.is_floating_point()
        }


class Unlaunched(dict[Any, Any]):
    """The memory of a `QuickLaunch` to which nothing is new, and whose launches do nothing."""

    def get(self, key: object, default: object = None) -> object:
        hash(key)
        return _unsent


def _unsent(programs: object, stream: object, arguments: object) -> None:
    """Stands for triton's launcher and the driver."""


def nothing(operator: Operator) -> str:
    """Put a kernel that computes nothing into the catalogue; its name."""
    kernel = Kernel(
        operator=operator.name, name="nothing", implementation="", supports=lambda workload, limits: None,
        devices=frozenset({"cpu", "cuda"}),
    )  # fmt: skip
    kernel.__dict__["torch_half"] = Nothing(operator)
    CATALOGUE.add_kernels([kernel])
    return "nothing"


def triton_kernels(operator: Operator) -> list[Kernel]:
    """The operator's kernels that this package wrote in Triton."""
    return [
        kernel
        for kernel in CATALOGUE.kernels(operator.name)
        if any("triton" in text for text in kernel.requires)
        and _launches(importlib.import_module(kernel.implementation.partition(":")[0]))
    ]


def _launches(module: ModuleType) -> list[QuickLaunch]:
    return [value for value in vars(module).values() if isinstance(value, QuickLaunch)]


@contextmanager
def nothing_sent() -> Iterator[None]:
    """Compiled kernels are not handed to triton's launcher; who gets them, and with what, is found as ever."""
    from triton.compiler import CompiledKernel

    run = CompiledKernel.run
    CompiledKernel.run = property(lambda compiled: lambda *values: None)
    try:
        yield
    finally:
        CompiledKernel.run = run


@contextmanager
def launches_left_out() -> Iterator[None]:
    """Kernels' Python runs as ever, up to where triton would hand a launch to the driver."""
    modules = [module for name, module in sys.modules.items() if name.startswith("subquad_kernels.")]
    before = {launch: launch._compiled for module in modules for launch in _launches(module)}
    for launch in before:
        launch._compiled = Unlaunched()
    try:
        yield
    finally:
        for launch, compiled in before.items():
            launch._compiled = compiled


def workloads(operator: Operator) -> Iterator[tuple[str, Workload]]:
    """A training call of ordinary widths, and a packed one, in bfloat16."""
    for example in operator.examples:
        if example.dtype != "float32" or example.phase == "decode" or example.options.get("initial_state"):
            continue
        shape = {axis: SIZES.get(axis, length) for axis, length in example.shape.items()}
        packed = "documents" in shape
        if packed:
            shape["b"] = 1
        if not example.options.get("window"):
            yield ("packed" if packed else "plain"), Workload(
                operator=operator.name, shape=shape, dtype="bfloat16", phase="backward", options=example.options
            )  # fmt: skip


def microseconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """The host's time of a call begun with an idle device: the least median of twenty groups of calls.

    What else runs on a machine only adds.
    """
    times = []
    gc.collect()
    gc.disable()
    for repeat in range(repeats + repeats // 10):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        result = call()
        end = time.perf_counter()
        del result
        if repeat >= repeats // 10:
            times.append(end - begin)
    gc.enable()
    group = -(-len(times) // 20)
    return 1e6 * min(statistics.median(times[first : first + group]) for first in range(0, len(times), group))


def compile_forwards(cases: list[tuple[Kernel, Workload]]) -> None:
    """First calls on a device beside each other: most of a compilation is no Python."""

    def first(job: tuple[Kernel, Workload]) -> None:
        kernel, case = job
        arguments = CATALOGUE.operator(kernel.operator).torch_half.sample_inputs(case, seed=0, device="cuda")
        with torch.no_grad():
            kernel.torch_half.forward(**arguments)

    for kernel, _ in cases:
        kernel.torch_half  # noqa: B018  (not in the threads: two that import one module may wait for each other)
    with ThreadPoolExecutor() as pool:
        list(pool.map(first, cases))


def measure(
    operator: Operator, kernel: str, case: Workload, device: str, repeats: int, forward: bool
) -> dict[str, float]:
    """The numbers of the page's head."""
    arguments = operator.torch_half.sample_inputs(case, seed=0, device=device)
    function = getattr(subquad_kernels.operators, operator.name)
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    recorded = arguments | leaves
    functions = CATALOGUE.kernel(operator.name, kernel).torch_half
    outputs = functions.forward(**arguments)
    pull = torch.ones_like(outputs[0])
    pulls = (pull, *(None for _ in operator.outputs[1:]))

    def call(values: dict[str, Any]) -> Any:
        found = function(**values, kernel=kernel)
        return found[0] if isinstance(found, tuple) else found

    def plain() -> object:
        with torch.no_grad():
            return call(arguments)

    def direct() -> object:
        return functions.backward(arguments, functions.forward(**arguments), pulls)

    inputs = list(leaves.values())
    found = {"op": microseconds(plain, repeats, device)}
    if forward:
        return found
    return found | {
        "op+grad": microseconds(lambda: call(recorded), repeats, device),
        "op+backward": microseconds(
            lambda: torch.autograd.grad(call(recorded), inputs, pull, allow_unused=True), repeats, device
        ),
        "kernel forward": microseconds(lambda: functions.forward(**arguments), repeats, device),
        "kernel both": microseconds(direct, repeats, device),
    }


def forward_steps(operator: Operator, kernel: Kernel, case: Workload, device: str) -> tuple[int, int]:
    """How many kernels a forward launches, and how many operations of torch's own it runs."""
    arguments = operator.torch_half.sample_inputs(case, seed=0, device=device)
    tensors = {name: value.detach() for name, value in arguments.items() if isinstance(value, Tensor)}
    with Recording(list(tensors.values())) as recording:
        results = kernel.torch_half.forward(**arguments | tensors)
    replay = recording.replay([result.contiguous() for result in results])
    if replay is None:
        print(f"    {kernel.key} is not replayed: {recording.refusal}")
        return -1, -1
    return replay.launches, len(replay.operations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=None, help="names of operators; all unless given")
    parser.add_argument("--forward", action="store_true", help="the operator's forward alone, without autograd")
    options = parser.parse_args()
    torch.set_num_threads(1)
    on_cuda = torch.cuda.is_available()
    rows: list[dict[str, Any]] = []
    columns = ("op",) if options.forward else ("op", "op+grad", "op+backward", "kernel forward", "kernel both")
    print(f"{'operator':20}{'case':8}{'kernel':22}" + "".join(f"{column:>16}" for column in columns))

    def report(operator: Operator, label: str, kernel: str, how: str, case: Workload, device: str) -> dict[str, float]:
        row = measure(operator, kernel, case, device, options.repeats, options.forward)
        rows.append({"operator": operator.name, "case": label, "kernel": kernel, "how": how, **row})
        print(
            f"{operator.name:20}{label:8}{how if how == kernel else f'{kernel} {how}':22}"
            + "".join(f"{row[column]:16.1f}" for column in columns),
            flush=True,
        )
        if options.json is not None:  # after each row: a run that is stopped keeps what it has
            device_name = torch.cuda.get_device_name() if on_cuda else "cpu"
            found = {"device": device_name, "versions": stack_versions(), "rows": rows}
            options.json.write_text(json.dumps(found, indent=1))
        return row

    chosen = [operator for operator in OPERATORS if options.only is None or operator.name in options.only]
    if on_cuda:
        compile_forwards(
            [
                (kernel, case)
                for operator in chosen
                for _, case in workloads(operator)
                for kernel in triton_kernels(operator)
                if kernel.first_calls_in_threads and kernel.supports(case, LIMITS) is None
            ]
        )
    for operator in chosen:
        empty = nothing(operator)
        for label, case in workloads(operator):
            base = report(operator, label, empty, "nothing", case, "cpu")["op"]
            for kernel in triton_kernels(operator):
                if kernel.supports(case, LIMITS) is not None:
                    continue
                with launches_left_out():
                    report(operator, label, kernel.name, "unlaunched", case, "cpu")
                if not on_cuda:
                    continue
                whole = report(operator, label, kernel.name, "launched", case, "cuda")["op"]
                with nothing_sent():
                    prepared = report(operator, label, kernel.name, "unsent", case, "cuda")["op"]
                launches, operations = forward_steps(operator, kernel, case, "cuda")
                print(
                    f"    a forward's {whole:.1f} us: the operator {base:.1f}, other host code {prepared - base:.1f}, "
                    f"{launches} launches {whole - prepared:.1f}; {operations} operations of torch",
                    flush=True,
                )


if __name__ == "__main__":
    main()
