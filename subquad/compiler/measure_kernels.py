"""Timing kernels on a workload, on the machine at hand; what is learned is kept in the user's cache."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subquad.compiler.estimators import measurement_record
from subquad.compiler.target import Target
from subquad.compiler.workload import cost_row
from subquad_cost_model import Measurement, time_rivals
from subquad_kernels.catalogue import Kernel, Operator
from subquad_kernels.workload import Workload

LEAST_BUDGET_S = 0.2
"""Below this nothing useful can be timed."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long each kernel is timed: rounds of at least `min_s`, once it has run for `warm_up_s`."""

    min_s: float
    repeats: int
    warm_up_s: float


QUICK = Effort(min_s=0.02, repeats=5, warm_up_s=0.0)
"""For choosing: what differs by less than this shows does not matter."""
THOROUGH = Effort(min_s=0.06, repeats=5, warm_up_s=0.2)
"""For numbers that are shown: 300 ms of calls after 200 ms, so that clocks have settled."""


class Measurer:
    """Measures rivals while a budget (seconds, all measurements together) lasts."""

    def __init__(self, target: Target, budget_s: float, effort: Effort = QUICK) -> None:
        self.store = measurement_record()
        self.spent_s = 0.0
        self._target, self._budget_s, self._effort = target, budget_s, effort

    def failure(self, operator: Operator, kernel: Kernel, workload: Workload) -> str | None:
        """Why the kernel cannot run this workload here, found by running it once; None if it can."""
        device = self._target.local
        if device is None or self._budget_s - self.spent_s < LEAST_BUDGET_S:
            return None
        started = time.perf_counter()
        try:
            with torch.no_grad():
                Call.of(operator, kernel, workload, device).run()
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
            arguments = operator.torch_half.sample_inputs(workload, seed=0, device=device)
            calls = {kernel.name: Call.of(operator, kernel, workload, device, arguments) for kernel in kernels}
            timings = time_rivals(
                {name: call.run for name, call in calls.items()},
                clock=device_clock(device),
                min_s=self._effort.min_s,
                repeats=self._effort.repeats,
                warm_up_s=self._effort.warm_up_s,
                budget_s=self._budget_s - self.spent_s,
            )
            peaks = {name: call.held_bytes + added_bytes(call.run, device) for name, call in calls.items()}
        for kernel in kernels:
            row, peak = cost_row(operator, kernel, workload), peaks[kernel.name] if device.startswith("cuda") else 0
            self.store.add(Measurement.of(row, self._target.device, timings[kernel.name], peak_bytes=peak))
        self.spent_s += time.perf_counter() - started
        return True


@dataclass(frozen=True)
class Call:
    """One call of a kernel without autograd: its forward, or its backward alone; `held_bytes` are those of its inputs.

    Results are laid out as the operator hands them on, so that a kernel of another layout is charged its conversion.
    Rivals may share the arguments: kernels do not write them.
    """

    run: Callable[[], object]
    held_bytes: int

    @classmethod
    def of(
        cls,
        operator: Operator,
        kernel: Kernel,
        workload: Workload,
        device: str,
        arguments: Mapping[str, Any] | None = None,
    ) -> Call:
        """The call that the workload describes, on these arguments or on samples."""
        if arguments is None:
            arguments = operator.torch_half.sample_inputs(workload, seed=0, device=device)
        forward = partial(_forward, kernel, arguments)
        if workload.phase != "backward":
            return cls(forward, _bytes_of(arguments.values()))
        outputs = forward()
        gradients: tuple[Tensor | None, ...] = tuple(
            torch.randn_like(output) for output in outputs[: len(operator.outputs)]
        )
        held = _bytes_of([*arguments.values(), *outputs, *gradients])
        return cls(partial(_backward, kernel, arguments, outputs, gradients), held)


def _forward(kernel: Kernel, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return tuple(output.contiguous() for output in kernel.torch_half.forward(**arguments))


def _backward(
    kernel: Kernel,
    arguments: Mapping[str, Any],
    outputs: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> dict[str, Tensor]:
    found = kernel.torch_half.backward(arguments, outputs, gradients)
    return {
        name: gradient.to(arguments[name].dtype).contiguous()
        for name, gradient in found.items()
        if gradient is not None and arguments[name] is not None
    }


def added_bytes(run: Callable[[], object], device: str) -> int:
    """How much more CUDA memory is in use at most during a call than before it; 0 on other devices."""
    if not device.startswith("cuda"):
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def device_clock(device: str, *, most_clears: int = 32, most_calls: int = 100) -> CudaClock | None:
    """How kernels on a device are timed: by a CUDA device's own events, or by the wall (None)."""
    if not device.startswith("cuda"):
        return None
    return CudaClock(device, most_clears=most_clears, most_calls=most_calls)


class CudaClock:
    """Seconds that a CUDA device works on calls, each with a cold cache: the median of a loop, times its calls.

    Before each call the device overwrites a buffer of twice its cache, as often as it takes to keep it busy until the
    host has queued the call: what lies between the events are kernels, without gaps that the host would leave. A call
    that takes longer to queue than `most_clears` last (32: a millisecond or two) is timed with the rest of its gaps.
    `most_calls` are enough for a median.
    """

    def __init__(self, device: str, *, most_clears: int = 32, most_calls: int = 100) -> None:
        self._most_clears, self._most_calls = most_clears, most_calls
        self._queued_s: dict[Callable[[], object], list[float]] = defaultdict(list)
        self._buffer = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8,
                                   device=device)  # fmt: skip
        self._clear_s = min(self._elapsed_s(self._buffer.zero_, 5, clears=0))

    def __call__(self, run: Callable[[], object], calls: int) -> float:
        # Twice as long: a host changes between two paces within a run, 9 and 14 us a launch, and one of the slower
        # loops that got the head start of the faster ones was a median four times what the device takes.
        queued_s = 2 * statistics.median(self._queued_s[run]) if self._queued_s[run] else math.inf
        clears = 1 + math.ceil(min(queued_s / self._clear_s, self._most_clears - 1))
        return statistics.median(self._elapsed_s(run, min(calls, self._most_calls), clears)) * calls

    def queued_s(self, run: Callable[[], object]) -> float:
        """What the host needed to queue a call of a loop: the median."""
        return statistics.median(self._queued_s[run])

    def _elapsed_s(self, run: Callable[[], object], calls: int, clears: int) -> list[float]:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for begin, end in pairs:
            for _ in range(clears):
                self._buffer.zero_()
            begin.record()
            started = time.perf_counter()
            run()
            self._queued_s[run].append(time.perf_counter() - started)
            end.record()
        torch.cuda.synchronize()
        # An event ticks every half microsecond.
        return [max(begin.elapsed_time(end) * 1e-3, 5e-7) for begin, end in pairs]


def _bytes_of(values: Iterable[object]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
