"""First calls beside each other: a Triton kernel is compiled when it is first called, and others need not wait for it.

Triton spends most of a compilation outside of Python (MLIR, LLVM, ptxas), where other threads run. Threads, unlike
processes, need no CUDA context and no import of torch each; later processes find what they compiled in Triton's cache.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.compilations import Compilation, compilations
from subquad_kernels.self_check import run_class, shape_class
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

Part = Literal["forward", "backward", "backward of the first output"]


@dataclass(frozen=True, kw_only=True)
class FirstCall:
    """One direction of a kernel, called on few and short sequences; `failure` is what it raised, if it did.

    `compiled` is what Triton compiled for it, but for kernels that another call was compiling at that time.
    """

    kernel: str
    workload: Workload
    part: Part
    seconds: float
    failure: str | None
    compiled: tuple[Compilation, ...] = ()


def first_calls(jobs: Iterable[tuple[Kernel, Workload]], device: str, *, threads: int | None = None) -> list[FirstCall]:
    """Call every kernel that compiles, in both directions, all at once; one thread a core unless `threads` says.

    Each is called as its self-check calls it, and with the heads and channels of the run, which may be another kernel
    to Triton.

    Kernels that compile nothing, or must be alone when they do, are left out. A backward is called with the gradient
    of every output, as checks do, and of the first alone, as training does where nobody uses a final state: to Triton
    an absent tensor is another kernel. What a kernel raises is noted; its self-check will raise it again.
    """
    kind = torch.device(device).type
    small = {
        (kernel, small_class(workload, kind))
        for kernel, workload in jobs
        for small_class in (shape_class, run_class)
        if kernel.compiles and kernel.first_calls_in_threads
    }
    calls = [
        call
        for kernel, workload in sorted(small, key=lambda job: (job[0].key, job[1].key))
        for call in _calls(kernel, workload, device)
    ]
    if not calls:
        return []
    if kind == "cuda":
        from triton.runtime import driver

        driver.active.get_current_device()  # builds a C module at its first use, once if it is done here
    pool = ThreadPoolExecutor(min(len(calls), threads or cores()))
    with compilations() as compiled:
        try:
            return [future.result() for future in [pool.submit(call, compiled) for call in calls]]
        finally:
            pool.shutdown(cancel_futures=True)  # on Ctrl-C only what has begun is waited for


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _calls(kernel: Kernel, workload: Workload, device: str) -> list[Callable[[list[Compilation]], FirstCall]]:
    operator = CATALOGUE.operator(kernel.operator)
    try:
        functions = kernel.torch_half  # not in the threads: two that import one module may wait for each other
    except Exception as error:  # a stranger's module may raise anything
        failed = FirstCall(kernel=kernel.key, workload=workload, part="forward", seconds=0.0, failure=_failure(error))
        return [lambda compiled: failed]
    arguments = operator.torch_half.sample_inputs(workload, seed=0, device=device)
    parts: dict[Part, Callable[[], object]] = {"forward": partial(functions.forward, **arguments)}
    if workload.phase != "decode":
        outputs = _outputs(operator, arguments)
        pulls = outputs[: len(operator.outputs)]
        parts["backward"] = partial(functions.backward, arguments, outputs, pulls)
        if len(pulls) > 1:
            alone = (pulls[0], *[None] * (len(pulls) - 1))
            parts["backward of the first output"] = partial(functions.backward, arguments, outputs, alone)
    return [partial(_first_call, kernel, workload, part, run, device) for part, run in parts.items()]


def _outputs(operator: Operator, arguments: Arguments) -> Outputs:
    """Outputs and residuals as a forward leaves them, but for their values: a backward need not wait for one."""
    return tuple(torch.zeros_like(output) for output in operator.torch_half.empty_outputs(arguments))


def _first_call(
    kernel: Kernel, workload: Workload, part: Part, run: Callable[[], object], device: str, compiled: list[Compilation]
) -> FirstCall:
    started, failure, before = time.perf_counter(), None, len(compiled)
    on_device = torch.cuda.device(device) if device.startswith("cuda") else nullcontext()
    try:
        with on_device, torch.no_grad():
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
    except Exception as error:  # a stranger's kernel may raise anything
        failure = _failure(error)
    mine = tuple(one for one in compiled[before:] if one.thread == threading.get_ident())
    seconds = time.perf_counter() - started
    return FirstCall(
        kernel=kernel.key, workload=workload, part=part, seconds=seconds, failure=failure, compiled=mine
    )  # fmt: skip


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
