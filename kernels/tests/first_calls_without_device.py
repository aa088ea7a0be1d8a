"""Make first calls as on an H100, without one: all is as it is there, but that what was compiled is not launched.

    python kernels/tests/first_calls_without_device.py SCENARIO...

Run as a script and not in the interpreter of Triton: triton's driver is a stand-in that names a device, loads nothing
and launches nothing. A scenario is a kernel of ours (OPERATOR/NAME), whose first calls are made twice with nothing
cached, in threads alone and with processes; or one of SCENARIOS, in which `three` small kernels are compiled by two
processes while something goes wrong. One JSON line each.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import triton_key

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels import compile_processes, first_calls
from subquad_kernels.catalogue import CATALOGUE, Kernel
from subquad_kernels.compilations import compilations
from subquad_kernels.first_calls import FirstCall
from subquad_kernels.triton_launch import QuickLaunch
from subquad_kernels.workload import DeviceLimits, Workload

HOPPER = DeviceLimits(kind="cuda", name="any", capability=(9, 0))


class Device:
    """A driver of triton that only says what it stands for."""

    utils = SimpleNamespace(
        load_binary=lambda *binary: (None, 1, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
    )

    def __init__(self) -> None:
        self.launched: list[str] = []

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: self.launched.append(metadata.name)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class BuildsLaunchers(Device):
    """As triton's before 3.7, builds what launches a kernel from its source, and needs more to be done with it."""

    @staticmethod
    def built(kernel: str) -> Path:
        return Path(os.environ["TRITON_CACHE_DIR"], f"launcher of {kernel}")

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        self.built(src.name).touch()
        name = metadata.name  # known when the kernel is compiled
        return lambda *arguments: self.launched.append(name)


class Operations(TorchDispatchMode):
    """Names torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def forget() -> None:
    """What this process knows of kernels that it compiled."""
    for launch in [one for one in gc.get_objects() if type(one) is QuickLaunch]:
        launch._compiled.clear()
        launch.jitted.device_caches.clear()


def made(kernel: Kernel, workload: Workload, processes: int, device: Device | None = None) -> dict[str, Any]:
    """What first calls report, and what this process itself compiled for them."""
    device = device or Device()
    driver.set_active(device)
    with TemporaryDirectory() as folder, compilations() as here, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        os.environ["TRITON_CACHE_DIR"] = folder
        forget()
        try:
            calls: list[FirstCall] = first_calls.first_calls([(kernel, workload)], "cpu", threads=processes)
        except KeyboardInterrupt:
            return {"interrupted": True, "children": len(multiprocessing.active_children())}
    return {
        "failures": [call.failure for call in calls],
        "compiled": sorted([one.kernel, one.hash, one.cached] for call in calls for one in call.compiled),
        "stages": all(one.stages and one.seconds <= call.seconds for call in calls for one in call.compiled),
        "here": sorted(one.kernel for one in here if not one.cached),
        "launched": sorted(set(device.launched)),
        "warnings": [str(one.message) for one in warned if one.category is RuntimeWarning],
    }


def ours(key: str) -> dict[str, Any]:
    """A kernel of the catalogue, and torch's operations while its launches are collected."""
    kernel = CATALOGUE.kernel(*key.split("/"))
    examples = CATALOGUE.operator(kernel.operator).examples
    steps = [one for one in examples if one.phase != "decode"] or examples
    workload = replace(next(one for one in steps if kernel.supports(one, HOPPER) is None), dtype="bfloat16")
    return {
        "threads": made(kernel, workload, processes=1),
        "processes": made(kernel, workload, processes=2),
        "operations": sorted(operations_while_collecting(kernel, workload)),
    }


def operations_while_collecting(kernel: Kernel, workload: Workload) -> set[str]:
    """Torch's operations on memory that no launch has filled."""
    operations = Operations()
    calls = first_calls._calls(kernel, first_calls.run_class(workload, "cpu"), "cpu")
    with compile_processes.collecting(), operations, torch.no_grad():
        for call in calls:
            call.run()
    return operations.names


@QuickLaunch
@triton.jit
def add_one(x, y, t, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(y + at, tl.load(x + at, mask=at < t) + 1, mask=at < t)


@QuickLaunch
@triton.jit
def add_two(x, y, t, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(y + at, tl.load(x + at, mask=at < t) + 2, mask=at < t)


@QuickLaunch
@triton.jit
def never_compiles(x, y, t, TILE: tl.constexpr):
    tl.static_assert(TILE < 0, "a tile is not negative")


class Three:
    """Launches all three, or those that compile."""

    def __init__(self, *kernels: QuickLaunch) -> None:
        self._kernels = kernels

    def forward(self, **arguments: Any) -> Any:
        x = arguments["x"]
        for kernel in self._kernels:
            kernel[(1,)](x, torch.empty_like(x), x.numel(), TILE=64, num_warps=1)

    def backward(self, arguments: Any, outputs: Any, gradients: Any) -> Any:
        self.forward(**arguments)


def small(
    *kernels: QuickLaunch, replayable: bool = True, processes: int = 2, device: Device | None = None
) -> dict[str, Any]:
    operator = CATALOGUE.operator("causal_conv")
    kernel = Kernel(
        operator=operator.name, name="small", implementation="nowhere", supports=lambda workload, limits: None,
        devices=frozenset({"cpu"}), requires=("triton",), replayable=replayable,
    )  # fmt: skip
    kernel.__dict__["torch_half"] = Three(*(kernels or (add_one, add_two)))
    return made(kernel, operator.examples[0], processes, device)


def otherwise(what: Callable[[Any], object], device: Device | None = None) -> dict[str, Any]:
    """The process that compiles `add_two` does `what`, which is told what is wanted, instead."""
    compile_kernel = compile_processes._compile

    def compile_or_not(wanted: Any, *rest: Any) -> None:
        if wanted.kernel == "add_two":
            wanted = replace(wanted, compile=partial(what, wanted))
        compile_kernel(wanted, *rest)

    compile_processes._compile = compile_or_not
    try:
        return small(device=device)
    finally:
        compile_processes._compile = compile_kernel


def badly(what: Callable[[], object]) -> dict[str, Any]:
    return otherwise(lambda wanted: what())


def launcher_first(wanted: Any) -> Any:
    """Compiles when a launcher is built."""
    ends = time.monotonic() + 20
    while not BuildsLaunchers.built(wanted.kernel).exists():
        assert time.monotonic() < ends, "no launcher is built beside"
        time.sleep(0.01)
    return wanted.compile()


def prepared() -> dict[str, Any]:
    """Triton's driver and library are asked while operands are drawn."""
    asked: list[str] = []

    class Asked(Device):
        def get_current_device(self) -> int:
            asked.append("driver")
            return 0

    driver.set_active(Asked())
    triton_key.cache_clear()
    with ThreadPoolExecutor(2) as beside:
        first_calls._prepare_triton("cuda", beside)
    return {"asked": asked, "hashed": triton_key.cache_info().currsize}


def interrupt_and_wait() -> None:
    time.sleep(1)  # until the parent waits
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)


def hangs() -> dict[str, Any]:
    longest_s, compile_processes._LONGEST_S = compile_processes._LONGEST_S, 10.0
    try:
        return badly(lambda: time.sleep(60))
    finally:
        compile_processes._LONGEST_S = longest_s


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "well": small,
    "alone": lambda: small(add_one),
    "killed": lambda: badly(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "hangs": hangs,
    "interrupted": lambda: badly(interrupt_and_wait),
    "asks for the device": lambda: badly(lambda: driver.active.get_current_device()),
    "no forks": lambda: small(processes=1),
    "foreign": lambda: small(replayable=False),
    "launcher first": lambda: otherwise(launcher_first, BuildsLaunchers()),
    "prepared": prepared,
    "broken": lambda: small(add_one, add_two, never_compiles),
}


if __name__ == "__main__":
    for scenario in sys.argv[1:]:
        found = SCENARIOS[scenario]() if scenario in SCENARIOS else ours(scenario)
        print(json.dumps({"scenario": scenario} | found), flush=True)
