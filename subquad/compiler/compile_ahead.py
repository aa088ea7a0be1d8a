"""Compile what self-checks are about to call, all at once: one after the other they would take many times as long."""

from __future__ import annotations

from collections.abc import Iterable

from subquad.log import say
from subquad_kernels.catalogue import Kernel
from subquad_kernels.first_calls import FirstCall, cores, first_calls
from subquad_kernels.self_check import VerdictStore
from subquad_kernels.workload import Workload


def compile_ahead(
    jobs: Iterable[tuple[Kernel, Workload]], device: str, verdicts: VerdictStore, *, again: bool = False
) -> list[FirstCall]:
    """Make the first calls of kernels whose verdicts are not known, or of all kernels `again`."""
    wanted = [
        job
        for job in dict.fromkeys(jobs)
        if job[0].compiles and job[0].first_calls_in_threads and (again or not verdicts.knows(*job, device))
    ]
    if not wanted:
        return []
    names = ", ".join(dict.fromkeys(kernel.key for kernel, _ in wanted))
    say(f"compiling {names} on {cores()} cores (once)")
    return first_calls(wanted, device)
