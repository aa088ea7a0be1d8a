"""Time what a launch costs the host: as kernels launch here, by triton's launcher, and by the driver alone.

    python kernels/benchmarks/launch_time.py [--repeats 2000] [--json OUT.json]

A number is the wall time, in microseconds, of so many launches of a kernel that does nothing, begun with an idle device
and not waited for: the least median of twenty groups. `sent` are launches as a replayed call makes them, `launcher`
the same without this package's Python, `driver` cuLaunchKernel from ctypes with arguments that lie ready. The first
launch of an idle device may cost more than the others: compare the differences of 1, 2, 4 and 8.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from host_time import microseconds

from subquad_kernels.self_check import stack_versions
from subquad_kernels.triton_launch import QuickLaunch

COUNTS = (0, 1, 2, 4, 8)


@QuickLaunch
@triton.jit(do_not_specialize=["a", "b", "c", "d"])
def few(x, y, a, b, c, d):  # type: ignore[no-untyped-def]
    """Six arguments."""


@QuickLaunch
@triton.jit
def many(  # type: ignore[no-untyped-def]
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9,
    b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9,
):  # fmt: skip
    """Forty, as kernels here have."""


def driver_launch(compiled: Any, pointers: list[int], numbers: list[int]) -> Callable[[int], None]:
    """cuLaunchKernel with its arguments in memory; two of scratch, which triton adds, are null."""
    values = [ctypes.c_uint64(pointer) for pointer in pointers] + [ctypes.c_int32(number) for number in numbers]
    values += [ctypes.c_uint64(0), ctypes.c_uint64(0)]
    addresses = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
    launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    function, threads, shared = compiled.function, 32 * compiled.metadata.num_warps, compiled.metadata.shared

    def send(stream: int) -> None:
        assert launch(function, 1, 1, 1, threads, 1, 1, shared, stream, addresses, None) == 0
        assert values  # kept for as long as their addresses

    return send


def ways(kernel: QuickLaunch, pointers: int, numbers: int) -> dict[str, Callable[[], None]]:
    """One launch in each of the three ways."""
    tensors = [torch.empty(64, device="cuda") for _ in range(pointers)]
    counts = [16] * numbers
    kernel[(1,)](*tensors, *counts, num_warps=4)
    (send,) = kernel._compiled.values()
    compiled: Any = send.args[0]  # type: ignore[attr-defined]
    stream = torch._C._cuda_getCurrentRawStream(0)
    addresses = [tensor.data_ptr() for tensor in tensors]
    arguments = [*addresses, *counts]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    driver = driver_launch(compiled, addresses, counts)
    torch.cuda.synchronize()
    return {
        "sent": lambda: send((1, 1, 1), stream, arguments.copy()),
        "launcher": lambda: run(1, 1, 1, stream, function, metadata, None, None, None, *arguments),
        "driver": lambda: driver(stream),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'arguments':10}{'way':10}" + "".join(f"{count:>9}" for count in COUNTS) + "   launches")
    for name, kernel, pointers, numbers in (("6", few, 2, 4), ("40", many, 10, 30)):
        for way, launch in ways(kernel, pointers, numbers).items():

            def calls(count: int, launch: Callable[[], None] = launch) -> None:
                for _ in range(count):
                    launch()

            times = {count: microseconds(partial(calls, count), options.repeats, "cuda") for count in COUNTS}
            rows.append({"arguments": name, "way": way, "us": times})
            print(f"{name:10}{way:10}" + "".join(f"{value:9.1f}" for value in times.values()), flush=True)
            if options.json is not None:
                found = {"device": torch.cuda.get_device_name(), "versions": stack_versions(), "rows": rows}
                options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
