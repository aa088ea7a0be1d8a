"""Time the first calls of a training step, nothing compiled before, on a CUDA device.

    python kernels/benchmarks/first_calls.py OUT.json [--kernels OPERATOR/NAME ...] [--in-threads] [--limit-s 200]

Each kernel has a process and a Triton cache of its own, so that nothing is known from another; the device is started
before the clock. The first process of a host also reads triton, gcc and ptxas from disk: a kernel that is named twice
is timed without that, too. `seconds` are those of `first_calls` (compilations, C modules, launches, a backward with the
gradient of every output and of the first), `variants` the kernels that Triton compiled for it, `in_turn_s` the sum of
their seconds, and `slowest_s` the longest of them, below which no number of cores gets. With --in-threads everything is
compiled by the calls themselves, in threads of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from timing import Limit, Record

from subquad_kernels.builtin import KERNELS
from subquad_kernels.catalogue import CATALOGUE, Kernel
from subquad_kernels.device_limits import device_limits
from subquad_kernels.first_calls import cores, first_calls
from subquad_kernels.workload import Workload

SIZES = {"b": 8, "t": 2_048, "h": 16, "h_k": 16, "h_kv": 16, "k": 64, "v": 64, "c": 2_048, "n": 64, "p": 64}
STATES = 16
"""Of the selective scan; a state of matrices has more."""
TIMED = tuple(
    kernel.key
    for kernel in KERNELS
    if kernel.compiles and kernel.replayable and CATALOGUE.operator(kernel.operator).takes_sequences
)


def step(kernel: Kernel) -> Workload:
    """The operator's first training step that the kernel supports here, in bfloat16 and at the widths of models."""
    limits = device_limits("cuda")
    for example in CATALOGUE.operator(kernel.operator).examples:
        shape = {axis: SIZES.get(axis, length) for axis, length in example.shape.items()}
        if "c" in shape and "n" in shape:
            shape["n"] = STATES
        workload = replace(example, shape=shape, dtype="bfloat16", phase="backward")
        if example.phase != "decode" and kernel.supports(workload, limits) is None:
            return workload
    raise ValueError(f"{kernel.key} supports no training step on this device")


def timed(key: str, in_threads: bool) -> dict[str, Any]:
    """What the first calls of one kernel took in this process."""
    kernel = CATALOGUE.kernel(*key.split("/"))
    if in_threads:
        functions = kernel.torch_half
        kernel = replace(kernel, replayable=False)
        kernel.__dict__["torch_half"] = functions
    torch.zeros(1, device="cuda")
    started = time.perf_counter()
    calls = first_calls([(kernel, step(kernel))], "cuda")
    seconds = time.perf_counter() - started
    compiled = [one for call in calls for one in call.compiled if not one.cached]
    slowest = max(compiled, key=lambda one: one.seconds)
    return {
        "seconds": seconds,
        "variants": len(compiled),
        "in_turn_s": sum(one.seconds for one in compiled),
        "slowest": slowest.kernel,
        "slowest_s": slowest.seconds,
        "stages": dict(slowest.stages),
        "failures": [call.failure for call in calls if call.failure],
    }


def in_own_process(key: str, in_threads: bool) -> dict[str, Any]:
    """As `timed`, by a fresh process with a fresh cache."""
    with TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, __file__, "-", "--kernels", key, *["--in-threads"] * in_threads],
            env=os.environ | {"TRITON_CACHE_DIR": folder}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if run.returncode:
        return {"failure": run.stderr[-400:]}
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the record; - prints the row of one kernel, timed in this process")
    parser.add_argument("--kernels", nargs="+", default=TIMED, metavar="OPERATOR/NAME")
    parser.add_argument("--in-threads", action="store_true")
    parser.add_argument("--limit-s", type=float, default=200.0)
    told = parser.parse_args()
    if told.out == "-":
        print(json.dumps(timed(told.kernels[0], told.in_threads)))
        return
    record, limit = Record.of("cuda", Path(told.out)), Limit(told.limit_s)
    for key in told.kernels:
        if limit.over():
            print(f"time is up before {key}")
            return
        row = {"kernel": key, "cores": cores(), "in_threads": told.in_threads} | in_own_process(key, told.in_threads)
        record.add("first_calls", row)
        print({name: value for name, value in row.items() if name != "stages"}, flush=True)


if __name__ == "__main__":
    main()
