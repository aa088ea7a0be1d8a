"""First calls beside each other: a Triton kernel is compiled when it is first called, and others need not wait for it.

What is known beforehand to be compiled is, in processes (`compile_processes`); the calls then find it in Triton's
folder, as later runs do. Everything else is compiled by the calls themselves, which are made in threads: those need no
CUDA context and no import of torch each, but wait for each other where Triton works in Python.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
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

    `compiled` is what Triton compiled for it, but for kernels that another call was compiling at that time, and
    `seconds` what the call took and its compilations in other processes.
    """

    kernel: str
    workload: Workload
    part: Part
    seconds: float
    failure: str | None
    compiled: tuple[Compilation, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A call that is to be made."""

    kernel: Kernel
    workload: Workload
    part: Part
    run: Callable[[], object]
    device: str

    def on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.startswith("cuda") else nullcontext()


def first_calls(jobs: Iterable[tuple[Kernel, Workload]], device: str, *, threads: int | None = None) -> list[FirstCall]:
    """Call every kernel that compiles, in both directions, all at once; one thread a core unless `threads` says.

    Each is called as its self-check calls it, and with the heads and channels of the run, which may be another kernel
    to Triton. Of those whose host code may be run for its launches alone (`replayable`) everything is compiled before
    the first call, a process for each kernel and as many at a time as there are threads.

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
    if not small:
        return []
    at_once = threads or cores()
    with ThreadPoolExecutor(2) as beside:
        prepared = _prepare_triton(kind, beside)  # while operands are drawn
        calls = [
            call
            for kernel, workload in sorted(small, key=lambda job: (job[0].key, job[1].key))
            for call in _calls(kernel, workload, device)
        ]
        for one in prepared:
            one.result()
    ahead = _compile_ahead(calls, at_once)
    pool = ThreadPoolExecutor(at_once)
    with compilations() as compiled:
        try:
            return [future.result() for future in [pool.submit(_first_call, call, compiled, ahead) for call in calls]]
        finally:
            pool.shutdown(cancel_futures=True)  # on Ctrl-C only what has begun is waited for


def _prepare_triton(kind: str, beside: Executor) -> list[Future[object]]:
    """What triton does at its first use: its driver builds a C module, its keys hash its library of 400 MB, imports."""
    if kind != "cuda":
        return []
    from triton.runtime import driver  # here: threads that import one module may see it before it is whole
    from triton.runtime.cache import triton_key

    begun = [beside.submit(lambda: driver.active.get_current_device()), beside.submit(triton_key)]
    import triton.experimental.gluon  # noqa: F401  (as triton does when it first looks at an argument)

    return begun


def _compile_ahead(calls: Iterable[_Call], processes: int) -> Mapping[str, Compilation]:
    """What replayable calls will look for in Triton's folder is there afterwards; what each took, by its hash."""
    replayable = [call for call in calls if call.kernel.replayable]
    if not replayable or importlib.util.find_spec("triton") is None:
        return {}
    from triton import knobs

    if knobs.runtime.interpret:
        return {}
    from subquad_kernels.compile_processes import collecting, compile_in_processes

    with collecting() as collection:
        for call in replayable:
            # What it raises, the call itself will raise again.
            with suppress(Exception), call.on_device(), torch.no_grad():
                call.run()
    return compile_in_processes(collection.wanted, processes)


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _calls(kernel: Kernel, workload: Workload, device: str) -> list[_Call]:
    operator = CATALOGUE.operator(kernel.operator)
    call = partial(_Call, kernel=kernel, workload=workload, device=device)
    try:
        functions = kernel.torch_half  # not in the threads: two that import one module may wait for each other
    except Exception as error:  # a stranger's module may raise anything
        return [call(part="forward", run=partial(_raise, error))]
    arguments = operator.torch_half.sample_inputs(workload, seed=0, device=device)
    calls = [call(part="forward", run=partial(functions.forward, **arguments))]
    if workload.phase != "decode":
        outputs = _outputs(operator, arguments)
        pulls = outputs[: len(operator.outputs)]
        calls.append(call(part="backward", run=partial(functions.backward, arguments, outputs, pulls)))
        if len(pulls) > 1:
            alone = (pulls[0], *[None] * (len(pulls) - 1))
            run = partial(functions.backward, arguments, outputs, alone)
            calls.append(call(part="backward of the first output", run=run))
    return calls


def _raise(error: Exception) -> None:
    raise error


def _outputs(operator: Operator, arguments: Arguments) -> Outputs:
    """Outputs and residuals as a forward leaves them, but for their values: a backward need not wait for one."""
    return tuple(torch.zeros_like(output) for output in operator.torch_half.empty_outputs(arguments))


def _first_call(call: _Call, compiled: list[Compilation], ahead: Mapping[str, Compilation]) -> FirstCall:
    started, failure, before, me = time.perf_counter(), None, len(compiled), threading.get_ident()
    try:
        with call.on_device(), torch.no_grad():
            call.run()
            if call.device.startswith("cuda"):
                torch.cuda.synchronize()
    except Exception as error:  # a stranger's kernel may raise anything
        failure = _failure(error)
    seconds = time.perf_counter() - started
    mine = [one for one in compiled[before:] if one.thread == me]
    found = [replace(ahead[one.hash], thread=me) for one in mine if one.hash in ahead]
    return FirstCall(
        kernel=call.kernel.key,
        workload=call.workload,
        part=call.part,
        seconds=seconds + sum(one.seconds for one in found),
        failure=failure,
        compiled=(*found, *[one for one in mine if one.hash not in ahead]),
    )


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
