"""Timing all kernels of one workload, as rows that keep failures as well as seconds."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from subquad.compiler.device_state import DeviceState
from subquad.compiler.measure_kernels import Call, Effort, added_bytes, device_clock
from subquad.compiler.target import Target
from subquad.compiler.workload import cost_row, phases
from subquad.errors import SubquadError
from subquad_cost_model import Clock, CostRow, HostPace, TimedRow, Timing, lower_bound_s, time_rivals
from subquad_cost_model.measure import wall_clock
from subquad_kernels.boundaries import fixed_boundaries
from subquad_kernels.catalogue import Kernel, Operator
from subquad_kernels.workload import Workload

BRIEF = Effort(min_s=0.006, repeats=3, warm_up_s=0.0)
"""Ten rows a second: three rounds of 6 ms or one call each. Medians of rounds are within a few percent."""
LONGEST_CALL_S = 0.2
"""Kernels expected to take longer are left out: one such row costs as much as ten others. One that does all the same
is timed by that call alone."""
LONGEST_QUEUED_S, LONGEST_CAPTURED_S = 1.4e-3, 1.0
"""A call that takes longer to queue is captured, and a graph of it timed: else it would wait for the host, which takes
what it likes (20 % more or less from one loop to the next). Half of the head start of the clock. One that takes longer
than the second as it is costs too much to capture. A graph of packed documents is replayed for these alone."""
CELL_BUDGET_S = 1.0
MOST_CLEARS, MOST_CALLS = 96, 16
"""Of the clock: the host has four milliseconds to queue a call of many launches, and few calls need that long."""
STEADY, SEVERAL, AGAIN_S = 0.03, 5, 0.35
"""Repeats further apart than this share are timed again in loops of several calls, where all take less than that."""
MOST_CACHED = 1 / 2
"""Of the device's memory, what torch may hold back before it is handed back: where it fills the device, a call that
needs a larger block waits for others to be freed, while it is timed."""
FEW_REPEATS = 1.5
"""How far one call says where others lie, either way, as in `time_rivals`."""
DECODES = 20
"""Calls in one CUDA graph, each with inputs of its own, so that each finds its state outside of the cache."""
MOST_COPIED_BYTES = 4 << 30


class DeviceLostError(SubquadError):
    """A kernel broke the CUDA context of this process; `rows` say which."""

    def __init__(self, rows: Sequence[TimedRow], reason: str) -> None:
        names = ", ".join(f"{row.row.operator}/{row.row.kernel} {row.row.phase}" for row in rows)
        super().__init__(
            what=f"the device failed under {names}: {reason}",
            where="measure",
            mend="run the same command again: what was measured is kept, and this kernel is left out at this size",
        )
        self.rows = tuple(rows)


@dataclass
class _Rival:
    kernel: Kernel
    row: CostRow
    call: Call | None = None
    run: Callable[[], object] | None = None
    calls: int = 1
    captured: bool = False
    timed: TimedRow | None = None


class PacedClock:
    """A clock that asks the host's pace right before and after each loop that it times."""

    def __init__(self, clock: Clock, pace: Callable[[], float]) -> None:
        self._clock, self._pace = clock, pace
        self._found: dict[Callable[[], object], list[float]] = defaultdict(list)

    def __call__(self, run: Callable[[], object], calls: int) -> float:
        before_s = self._pace()
        seconds = self._clock(run, calls)
        self._found[run] += (before_s, self._pace())
        return seconds

    def host_s(self, run: Callable[[], object]) -> float:
        """The median beside all loops of this call."""
        return statistics.median(self._found[run])


class CellTimer:
    """Times the kernels of one workload after another on a target, for one run."""

    def __init__(self, target: Target, *, run_id: str, source: str = "subquad measure", effort: Effort = BRIEF) -> None:
        assert target.local is not None
        self.seconds: dict[str, float] = defaultdict(float)  # on the wall, by kernel
        self.expected_too_slow: dict[str, int] = defaultdict(int)
        self._target, self._device, self._effort = target, target.local, effort
        self._cuda = self._device.startswith("cuda")
        self._run_id, self._source = run_id, source
        self._state = DeviceState(self._device)
        self._host = HostPace("cuda" if self._cuda else "cpu")
        self._pace: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)

    def rows(self, operator: Operator, kernels: Sequence[Kernel], workload: Workload) -> list[TimedRow]:
        """Rows of a workload's phases by every kernel that is not expected to take too long; failures are rows too.

        Raises: DeviceLostError when nothing more can run in this process.
        """
        kept = {
            part.phase: [kernel for kernel in kernels if not self._too_slow(cost_row(operator, kernel, part))]
            for part in _parts(workload)
        }
        if not any(kept.values()):
            return []  # before memory is taken for what nobody runs
        found: list[TimedRow] = []
        self._make_room()
        with torch.no_grad():
            try:
                arguments = operator.torch_half.sample_inputs(workload, seed=0, device=self._device)
            except torch.OutOfMemoryError:
                rows = [cost_row(operator, kernel, part) for part in _parts(workload) for kernel in kept[part.phase]]
                return [self._failed(row, "oom") for row in rows]
            boundaries = arguments.get("cu_seqlens")
            lengths = tuple(boundaries.diff().tolist()) if isinstance(boundaries, torch.Tensor) else ()
            for part in _parts(replace(workload, document_lengths=lengths)):
                copies = self._copies(arguments) if part.phase == "decode" else ()
                rivals = [_Rival(kernel, cost_row(operator, kernel, part)) for kernel in kept[part.phase]]
                for rival in rivals:
                    with self._charged(rival.kernel):
                        self._begin(rival, operator, part, arguments, copies)
                self._time([rival for rival in rivals if rival.timed is None])
                found += [rival.timed for rival in rivals if rival.timed is not None]
        return found

    def failed(self, operator: Operator, kernel: Kernel, workload: Workload, error: float | None) -> list[TimedRow]:
        """Rows of a kernel that declines the workload or raises, or whose results are off by this error."""
        rows = [cost_row(operator, kernel, part) for part in _parts(workload)]
        if error is None:
            return [self._failed(row, "unsupported") for row in rows]
        return [replace(self._failed(row, "wrong"), max_abs_error=error) for row in rows]

    def _copies(self, arguments: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """The arguments and as many copies as a graph has calls, if memory allows."""
        if not self._cuda:
            return ()
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        held_bytes = sum(tensor.nbytes for tensor in tensors.values())
        count = max(1, min(DECODES, MOST_COPIED_BYTES // max(1, held_bytes)))
        further = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(count - 1)]
        return [arguments, *({**arguments, **copied} for copied in further)]

    def _begin(
        self,
        rival: _Rival,
        operator: Operator,
        part: Workload,
        arguments: Mapping[str, Any],
        copies: Sequence[Mapping[str, Any]],
    ) -> None:
        """Call it twice, or capture it; what it raises becomes its row, and so does a call that takes long.

        The second may still compile, which the third does not.
        """
        try:
            call = Call.of(operator, rival.kernel, part, self._device, arguments)
            rival.call, rival.run = call, call.run
            call.run()
            self._wait()
            queued_s, once_s = self._once(call)
            if max(once_s / LONGEST_CALL_S, queued_s / LONGEST_QUEUED_S) > 1:
                queued_s, once_s = self._once(call)
            if copies and once_s <= LONGEST_CALL_S:
                further = [Call.of(operator, rival.kernel, part, self._device, copied).run for copied in copies]
                self._capture(rival, further, DECODES)
            elif self._cuda and LONGEST_QUEUED_S < queued_s <= once_s <= LONGEST_CAPTURED_S:
                self._capture(rival, [call.run], 1)
            if once_s > LONGEST_CALL_S and not rival.captured:
                peak = call.held_bytes + added_bytes(call.run, self._device) if self._cuda else None
                once = Timing(low_s=once_s / FEW_REPEATS, median_s=once_s, high_s=once_s * FEW_REPEATS, repeats=1)
                rival.timed = self._ok(rival, once, peak, {"host_s": self._host()})
        except Exception as error:  # a stranger's kernel may raise anything
            rival.timed = self._raised(rival, error)

    def _once(self, call: Call) -> tuple[float, float]:
        """Seconds until one call is queued, and until it is done."""
        started = time.perf_counter()
        call.run()
        queued_s = time.perf_counter() - started
        self._wait()
        return queued_s, time.perf_counter() - started

    def _capture(self, rival: _Rival, calls: Sequence[Callable[[], object]], count: int) -> None:
        """Replace the call by a graph of so many; what cannot be captured is timed as it is, and the row says so."""
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        try:
            # Not torch.cuda.graph(), which hands all cached memory back each time.
            with torch.cuda.stream(aside), fixed_boundaries():
                graph.capture_begin()
                try:
                    kept = [calls[turn % len(calls)]() for turn in range(count)]
                finally:
                    graph.capture_end()
        except RuntimeError:
            self._wait()
            return
        self._wait()
        graph.replay()
        self._wait()

        def replay() -> object:
            graph.replay()
            return calls, kept  # what the graph reads and writes lives as long as it does

        rival.run, rival.calls, rival.captured = replay, count, True

    def _time(self, rivals: Sequence[_Rival]) -> None:
        try:
            self._time_together(rivals)
        except torch.OutOfMemoryError:  # rivals that take turns hold their inputs at the same time
            for rival in rivals:
                try:
                    torch.cuda.empty_cache()
                    self._time_together([rival])
                except Exception as error:
                    rival.timed = self._raised(rival, error)
        except Exception as error:  # it ran once: such a failure is the device's
            raise DeviceLostError([self._failed(rival.row, "wrong") for rival in rivals], str(error)) from error

    def _time_together(self, rivals: Sequence[_Rival]) -> None:
        if not rivals:
            return
        runs = {rival.kernel.name: rival.run for rival in rivals if rival.run is not None}
        started = time.perf_counter()
        self._state.start()
        timings, host = self._timings(runs)
        state = self._state.stop()
        for rival in rivals:
            assert rival.call is not None
            name = rival.kernel.name
            peak = rival.call.held_bytes + added_bytes(rival.call.run, self._device) if self._cuda else None
            timing = _each(timings[name], rival.calls)
            if rival.captured:
                host[name].pop("queued_s", None)  # a graph's, whose calls the host never queued
            rival.timed = self._ok(rival, timing, peak, {**state, **host[name]})
        spent = time.perf_counter() - started
        total = sum(timings[rival.kernel.name].median_s for rival in rivals)
        for rival in rivals:
            share = timings[rival.kernel.name].median_s / total
            self.seconds[rival.kernel.key] += spent * (0.5 / len(rivals) + 0.5 * share)

    def _timings(
        self, runs: Mapping[str, Callable[[], object]]
    ) -> tuple[dict[str, Timing], dict[str, dict[str, float]]]:
        """Of each run, and what its row says of the host. What is not steady is timed once more, with more calls."""
        timings: dict[str, Timing] = {}
        host: dict[str, dict[str, float]] = {}

        def time_them(names: Sequence[str], min_s: float) -> None:
            device = device_clock(self._device, most_clears=MOST_CLEARS, most_calls=MOST_CALLS)
            clock = PacedClock(device or wall_clock(), self._host)
            effort = self._effort
            timings.update(
                time_rivals(
                    {name: runs[name] for name in names},
                    clock=clock,
                    min_s=min_s,
                    repeats=effort.repeats,
                    warm_up_s=effort.warm_up_s,
                    budget_s=CELL_BUDGET_S,
                )
            )
            for name in names:
                host[name] = {"host_s": clock.host_s(runs[name])}
                if device is not None:
                    host[name]["queued_s"] = device.queued_s(runs[name])

        time_them(list(runs), self._effort.min_s)
        for name, first in list(timings.items()):
            several_s = SEVERAL * first.median_s
            if first.high_s - first.low_s > STEADY * first.median_s and self._effort.repeats * several_s < AGAIN_S:
                time_them([name], max(several_s, self._effort.min_s))
        return timings, host

    def _too_slow(self, row: CostRow) -> bool:
        """By the measured row whose bound is nearest, of the same type where there is one: both scale alike."""
        key, phase = f"{row.operator}/{row.kernel}", row.phase
        pace = self._pace[key, phase, row.dtype] or [
            known for (name, part, _), rows in self._pace.items() if (name, part) == (key, phase) for known in rows
        ]
        if not pace:
            return False
        bound_s = lower_bound_s(row, self._target.device)
        near_s, seconds = min(pace, key=lambda known: abs(math.log(known[0] / bound_s)))
        too_slow = seconds * bound_s / near_s > LONGEST_CALL_S
        self.expected_too_slow[key] += too_slow
        return too_slow

    def _ok(self, rival: _Rival, timing: Timing, peak: int | None, state: Mapping[str, Any]) -> TimedRow:
        pace = self._pace[rival.kernel.key, rival.row.phase, rival.row.dtype]
        pace.append((lower_bound_s(rival.row, self._target.device), timing.median_s))
        return replace(
            self._failed(rival.row, "unsupported"),
            status="ok",
            median_s=timing.median_s,
            low_s=timing.low_s,
            high_s=timing.high_s,
            peak_bytes=peak,
            warm_ups=4 if timing.repeats > 1 else 1,
            repeats=timing.repeats,
            cold_cache=self._cuda,
            cuda_graph=rival.captured,
            **state,
        )

    def _raised(self, rival: _Rival, error: Exception) -> TimedRow:
        """The row of a kernel that cannot run at this size."""
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return self._failed(rival.row, "oom")
        try:
            self._wait()
        except RuntimeError as lost:
            raise DeviceLostError([self._failed(rival.row, "wrong")], str(error).splitlines()[0]) from lost
        return self._failed(rival.row, "unsupported")

    def _failed(self, row: CostRow, status: Any) -> TimedRow:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return TimedRow(
            row=row, device=self._target.device, status=status, date=date, run_id=self._run_id, source=self._source
        )

    def _make_room(self) -> None:
        if self._cuda and torch.cuda.memory_reserved() > MOST_CACHED * self._target.device.memory_bytes:
            torch.cuda.empty_cache()

    @contextmanager
    def _charged(self, kernel: Kernel) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[kernel.key] += time.perf_counter() - started

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def _parts(workload: Workload) -> tuple[Workload, ...]:
    return phases(workload, workload.phase != "decode")


def _each(timing: Timing, calls: int) -> Timing:
    return replace(timing, low_s=timing.low_s / calls, median_s=timing.median_s / calls, high_s=timing.high_s / calls)
