"""Self-checks and first calls of many kernels, in processes beside each other: what is timed later is compiled.

Threads would share Python's lock, under which Triton builds each kernel before LLVM takes over; a few hundred kernels
take minutes that way. What a process compiles, others find in Triton's cache on disk.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import IMapIterator

import torch

from subquad.cache import user_cache
from subquad.compiler.measure_kernels import Call
from subquad.compiler.shape_pool import stretched
from subquad.compiler.workload import phases
from subquad.registry import load_registry
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.device_limits import device_limits
from subquad_kernels.self_check import VerdictStore
from subquad_kernels.workload import Workload


@dataclass(frozen=True)
class Job:
    """A kernel and a layout (its smallest workload)."""

    operator: str
    kernel: str
    layout: Workload


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """How a job ended. `failure` is why the kernel is not timed, if so; `error` the largest of a failed self-check.

    `known` is False where the process, not the kernel, failed: nothing was found out.
    """

    job: Job
    error: float | None = None
    failure: str | None = None
    known: bool = True
    seconds: float = 0.0


def prepare(jobs: Sequence[Job], device: str, *, budget_s: float, processes: int) -> Iterator[Prepared]:
    """Each job as it ends, until the budget is spent: what is under way then is dropped. No process: done here."""
    end = time.monotonic() + budget_s
    if not processes:
        for job in jobs:
            if time.monotonic() > end:
                return
            yield _prepare((job, device))
        return
    with multiprocessing.get_context("spawn").Pool(min(processes, len(jobs)), _begin) as pool:
        results: IMapIterator[Prepared] = pool.imap_unordered(_prepare, [(job, device) for job in jobs])
        for _ in jobs:
            try:
                yield results.next(timeout=max(0.0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                return


def worker_processes(device: str) -> int:
    """One a core but for that of this process; none where nothing is compiled."""
    return max(1, len(os.sched_getaffinity(0)) - 1) if device.startswith("cuda") else 0


def _begin() -> None:
    """A fresh process knows no operators, and has one core, where inductor (FlexAttention) would start processes."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.set_num_threads(1)
    load_registry()


def _prepare(task: tuple[Job, str]) -> Prepared:
    job, device = task
    started = time.perf_counter()
    operator, kernel = CATALOGUE.operator(job.operator), CATALOGUE.kernel(job.operator, job.kernel)
    if not _works(device):
        return Prepared(job=job, failure="an earlier kernel broke this process", known=False)
    last = phases(job.layout, job.layout.phase != "decode")[-1]
    folder = user_cache("verdicts")
    verdict = VerdictStore(None if folder is None else folder / "verdicts.jsonl").check(kernel, last, device)
    failure = None if verdict.passed else f"failed its self-check: {verdict.reason}"
    if verdict.passed and kernel.compiles:
        try:
            with torch.no_grad():
                # A long sequence is cut among programs, by kernels that the smallest workload does not launch.
                for workload in (last, stretched(last)):
                    if kernel.supports(workload, device_limits(device)) is None:
                        Call.of(operator, kernel, workload, device).run()
            _wait(device)
        except Exception as error:  # a stranger's kernel may raise anything; its rows will say so
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
    return Prepared(
        job=job,
        error=None if verdict.passed else max(verdict.errors.values(), default=None),
        failure=failure,
        seconds=time.perf_counter() - started,
    )


def _works(device: str) -> bool:
    try:
        _wait(device)
    except RuntimeError:  # an illegal access stays with a process for good
        return False
    return True


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
