"""Timing kernels on a workload, on the machine at hand; what is learned is kept in the user's cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from subquad.cache import user_cache
from subquad.compiler.target import Target
from subquad.compiler.workload import cost_row
from subquad_cost_model import Measurement, MeasurementStore, time_rivals
from subquad_kernels.catalogue import Kernel, Operator
from subquad_kernels.workload import Workload

REPEATS = 5
MIN_S = 0.02
LEAST_BUDGET_S = 0.2
"""Below this nothing useful can be timed."""


class Measurer:
    """Measures rivals while a budget (seconds, all measurements together) lasts."""

    def __init__(self, target: Target, budget_s: float) -> None:
        folder = user_cache("measurements")
        self.store = MeasurementStore(None if folder is None else folder / "kernels.jsonl")
        self.spent_s = 0.0
        self._target, self._budget_s = target, budget_s

    def failure(self, operator: Operator, kernel: Kernel, workload: Workload) -> str | None:
        """Why the kernel cannot run this workload here, found by running it once; None if it can."""
        device = self._target.local
        if device is None or self._budget_s - self.spent_s < LEAST_BUDGET_S:
            return None
        started = time.perf_counter()
        try:
            with torch.no_grad():
                call_of(operator, kernel, workload, device)()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
        except Exception as error:  # a stranger's kernel may raise anything: it is named, and its rivals are measured
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            self.spent_s += time.perf_counter() - started
        return None

    def measure(self, operator: Operator, kernels: Sequence[Kernel], workload: Workload) -> bool:
        """Time these kernels on the workload, interleaved, and record it; False when the budget is spent."""
        device = self._target.local
        if device is None or self._budget_s - self.spent_s < LEAST_BUDGET_S:
            return False
        started = time.perf_counter()
        with torch.no_grad():
            rivals = {kernel.name: call_of(operator, kernel, workload, device) for kernel in kernels}
            timings = time_rivals(
                rivals,
                synchronize=torch.cuda.synchronize if device.startswith("cuda") else None,
                min_s=MIN_S,
                repeats=REPEATS,
                budget_s=self._budget_s - self.spent_s,
            )
        for kernel in kernels:
            row = cost_row(operator, kernel, workload)
            self.store.add(Measurement.of(row, self._target.device, timings[kernel.name]))
        self.spent_s += time.perf_counter() - started
        return True


def call_of(operator: Operator, kernel: Kernel, workload: Workload, device: str) -> Callable[[], object]:
    """One call of a kernel on fresh sample inputs: its forward, or its backward alone."""
    arguments = operator.torch_half.sample_inputs(workload, seed=0, device=device)
    forward = partial(kernel.torch_half.forward, **arguments)
    if workload.phase != "backward":
        return forward
    outputs = tuple(output.contiguous() for output in forward())
    gradients: tuple[Tensor | None, ...] = tuple(
        torch.randn_like(output) for output in outputs[: len(operator.outputs)]
    )
    return partial(kernel.torch_half.backward, arguments, outputs, gradients)
