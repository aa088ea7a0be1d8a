"""Measuring a pool of shapes for a stated time, into a folder that a later run goes on with."""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice, zip_longest
from pathlib import Path

import subquad_kernels.operators  # noqa: F401  (registers the torch operators)
from subquad.compiler.choose import REFERENCE
from subquad.compiler.prepare_kernels import Job, Prepared, prepare, worker_processes
from subquad.compiler.shape_pool import KINDS, kind_of, layouts, shapes
from subquad.compiler.target import Target
from subquad.compiler.time_cells import CellTimer, DeviceLostError
from subquad.compiler.workload import cost_row, phases
from subquad.log import say
from subquad_cost_model import LearnedEstimator, TimedRow, Trees, lower_bound_s, read_timed_rows, timed
from subquad_cost_model import write_timed_rows as write_rows
from subquad_cost_model.sampler import Cell, Sampler
from subquad_cost_model.shape_groups import is_held_out
from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.workload import Workload

PREPARING = 0.35
"""The share of the budget that compiling and checking may take; layouts that are not ready then are left out."""
MOST_OF_A_KERNEL, MOST_OF_FEW = 0.06, 2.0
"""The share of the budget that one kernel may take, or so many equal parts of it where kernels are few: one that
compiles for every length is then left out."""
WRITE_EVERY_S = 20.0
LARGEST_BOUND_S = {"cpu": 0.02, "cuda": 0.015}
"""No kernel can be faster: larger shapes cost more time than they teach."""
MEMORY_SHARE = 1 / 24
"""Of the device's memory, what one call must move and keep: rivals that take turns hold theirs at the same time."""
BATCH = 32
FIRST_DOUBT = 1000
"""Rows before a model is fitted whose doubts choose; a fit takes seconds."""
FAST_TREES = Trees(rounds=100, leaves=15, spread_rounds=40, threads=4)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure: names and kinds (empty: all), so many layouts of each operator and shapes of each layout.

    Kinds are chosen among the layouts that are drawn: the pool of some is a part of the pool of all.
    """

    operators: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()  # `name` or `operator/name`
    kinds: tuple[str, ...] = ()  # of layouts: `shape_pool.KINDS`
    layouts: int = 16
    shapes: int = 64
    seed: int = 0
    doubts: bool = True  # whether a model of the rows so far chooses every other batch


@dataclass(frozen=True)
class Found:
    """One workload of the pool with the kernels that may run it."""

    operator: Operator
    layout: Workload
    workload: Workload
    kernels: tuple[Kernel, ...]


class SampleRun:
    """One run of measuring; `rows` are those of earlier runs in the folder and of this one."""

    def __init__(
        self, target: Target, folder: Path, plan: Plan, *, budget_s: float, source: str = "subquad measure"
    ) -> None:
        assert target.local is not None
        self.rows: list[TimedRow] = []
        self._target, self._folder, self._plan, self._budget_s = target, folder, plan, budget_s
        self._started = time.monotonic()
        self._id = uuid.uuid4().hex[:12]
        self._file = folder / f"run-{self._id}.parquet"
        self._timer = CellTimer(target, run_id=self._id, source=source)
        self._new: list[TimedRow] = []
        self._written_at = self._started
        self._installed = {operator.name: _installed(operator, plan.kernels, target) for operator in CATALOGUE}
        self._fitted: tuple[int, LearnedEstimator] | None = None
        if folder.exists() and any(folder.glob("*.parquet")):
            self.rows = [row for row in read_timed_rows(folder) if _same(row, target)]

    @property
    def left_s(self) -> float:
        """What is left of the budget."""
        return self._started + self._budget_s - time.monotonic()

    @property
    def most_of_a_kernel_s(self) -> float:
        """What one kernel may take of the budget."""
        kernels = sum(len(self._kernels(operator)) for operator in self._operators())
        return max(MOST_OF_A_KERNEL, MOST_OF_FEW / max(1, kernels)) * self._budget_s

    def run(self) -> list[TimedRow]:
        """Measure until the budget is spent or nothing is left, and return the new rows.

        Raises: DeviceLostError, when what was measured has been written.
        """
        pool = self._prepared()
        self.rows += self._new
        known = {row.row.key for row in self.rows}
        cells, found = self._cells(pool)
        sampler = Sampler(cells, self._target.device, seed=self._plan.seed)
        done = {index for index, cell in enumerate(cells) if any(row.key in known for row in cell.rows)}
        self._say(f"{len(cells)} shapes, {len(done)} measured before")
        try:
            for index in self._order(sampler, done):
                if self.left_s <= 0:
                    break
                self._measure(found[index])
                done.add(index)
        except DeviceLostError as error:
            self._keep(error.rows)
            raise
        finally:
            self._write()
        return self._new

    def _measure(self, found: Found) -> None:
        in_time = [kernel for kernel in found.kernels if self._timer.seconds[kernel.key] < self.most_of_a_kernel_s]
        if in_time:
            self._keep(self._timer.rows(found.operator, in_time, found.workload))
        if time.monotonic() - self._written_at > WRITE_EVERY_S:
            self._write()

    def _keep(self, rows: Sequence[TimedRow]) -> None:
        self._new += rows
        self.rows += rows

    def _order(self, sampler: Sampler, done: set[int]) -> Iterator[int]:
        """Batches that fill the space and, once there is a model, batches that it doubts, in turn."""
        filling = (index for index in sampler.filling(frozenset(done)) if index not in done)
        while batch := list(islice(filling, BATCH)):
            yield from batch
            learned = self._learned()
            if learned is not None:
                yield from sampler.informative(learned, count=BATCH, done=done)

    def _learned(self) -> LearnedEstimator | None:
        """A small model of the rows so far without the held-out ones, fitted anew when they are half as many more."""
        rows = [row for row in timed(self.rows) if not is_held_out(row.row)]
        if not self._plan.doubts or len(rows) < FIRST_DOUBT or find_spec("lightgbm") is None:
            return None
        if self._fitted is None or len(rows) > 1.5 * self._fitted[0]:
            self._fitted = len(rows), replace(LearnedEstimator.fit(rows, trees=FAST_TREES), abstains=False)
        return self._fitted[1]

    def _prepared(self) -> list[Found]:
        """The pool: shapes of all layouts, each with the kernels that support it and passed their check."""
        device = self._target.local
        assert device is not None
        drawn = {operator: self._layouts(operator) for operator in self._operators()}
        # Operators in turn, so that a budget that ends early leaves some of each.
        turns = [
            [Job(operator.name, kernel.name, layout) for layout in of_it for kernel in self._able(operator, layout)]
            for operator, of_it in drawn.items()
        ]
        jobs = [job for turn in zip_longest(*turns) for job in turn if job is not None]
        self._say(f"checking and compiling {len(jobs)} kernels and layouts")
        passed: set[Job] = set()
        ready: dict[Job, Prepared] = {}
        for done in prepare(jobs, device, budget_s=PREPARING * self._budget_s, processes=worker_processes(device)):
            ready[done.job] = done
            if done.failure is None:
                passed.add(done.job)
            elif done.known:
                self._say(f"{done.job.operator}/{done.job.kernel} {_short(done.job.layout)}: {done.failure}")
        self._say(f"{len(passed)} of {len(jobs)} are ready after {self._budget_s - self.left_s:.0f} s")
        known = {row.row.key for row in self.rows}
        pool = []
        for operator, of_it in drawn.items():
            for layout in of_it:
                self._keep_refusals(operator, layout, ready, known)
                able = {job.kernel for job in passed if (job.operator, job.layout) == (operator.name, layout)}
                for workload in shapes(layout, self._target.kind, self._plan.shapes, seed=self._plan.seed):
                    kernels = tuple(k for k in self._able(operator, workload) if k.name in able)
                    if kernels and self._fits(operator, kernels[0], workload):
                        pool.append(Found(operator, layout, workload, kernels))
        return pool

    def _keep_refusals(
        self, operator: Operator, layout: Workload, ready: Mapping[Job, Prepared], known: set[str]
    ) -> None:
        """Once per layout: kernels that decline it or raise, and those whose results are wrong."""
        for kernel in self._kernels(operator):
            done = ready.get(Job(operator.name, kernel.name, layout))
            if done is not None and done.failure is not None and done.known:
                rows = self._timer.failed(operator, kernel, layout, done.error)
            elif _refusal(kernel, layout, self._target) is not None:
                rows = self._timer.failed(operator, kernel, layout, None)
            else:
                continue  # it runs, or was not ready in time
            self._new += [row for row in rows if row.row.key not in known]

    def _cells(self, pool: Sequence[Found]) -> tuple[list[Cell], list[Found]]:
        cells = [
            Cell(
                tuple(
                    cost_row(found.operator, kernel, part)
                    for part in phases(found.workload, found.workload.phase != "decode")
                    for kernel in found.kernels
                )
            )
            for found in pool
        ]
        return cells, list(pool)

    def _operators(self) -> list[Operator]:
        return [operator for operator in CATALOGUE if not self._plan.operators or operator.name in self._plan.operators]

    def _layouts(self, operator: Operator) -> list[Workload]:
        drawn = layouts(operator, self._target.kind, self._plan.layouts, seed=self._plan.seed)
        return [layout for layout in drawn if kind_of(layout) in (self._plan.kinds or KINDS)]

    def _kernels(self, operator: Operator) -> list[Kernel]:
        return self._installed[operator.name]

    def _able(self, operator: Operator, workload: Workload) -> list[Kernel]:
        return [kernel for kernel in self._kernels(operator) if _refusal(kernel, workload, self._target) is None]

    def _fits(self, operator: Operator, kernel: Kernel, workload: Workload) -> bool:
        row = cost_row(operator, kernel, workload)
        memory_bytes = MEMORY_SHARE * self._target.device.memory_bytes
        return (
            row.bytes_moved + row.saved_bytes <= memory_bytes
            and lower_bound_s(row, self._target.device) <= LARGEST_BOUND_S[self._target.kind]
        )

    def _write(self) -> None:
        """This run's file anew, all at once: a reader meets the old one or the new one."""
        self._written_at = time.monotonic()
        if not self._new:
            return
        unfinished = self._file.with_suffix(".unfinished")
        write_rows(unfinished, self._new)
        os.replace(unfinished, self._file)
        counts = Counter(row.status for row in self._new)
        found = ", ".join(f"{count} {status}" for status, count in counts.items())
        self._say(f"{found}; {max(0.0, self.left_s):.0f} s left")  # the last row may end after the budget

    def _say(self, text: str) -> None:
        say(f"[{self._budget_s - self.left_s:5.0f} s] {text}")

    def spent(self) -> dict[str, float]:
        """Seconds by kernel."""
        return dict(self._timer.seconds)

    def too_slow(self) -> dict[str, int]:
        """Rows left out because they were expected to take too long, by kernel."""
        return {name: count for name, count in self._timer.expected_too_slow.items() if count}


def by_kernel(rows: Sequence[TimedRow]) -> dict[str, Counter[str]]:
    """How many rows of each status a kernel has."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[f"{row.row.operator}/{row.row.kernel}"][row.status] += 1
    return dict(counts)


def _same(row: TimedRow, target: Target) -> bool:
    return row.device.name == target.device.name and dict(row.device.versions) == dict(target.device.versions)


def _installed(operator: Operator, wanted: Sequence[str], target: Target) -> list[Kernel]:
    """The kernels asked for that this machine has."""
    return [
        kernel
        for kernel in CATALOGUE.kernels(operator.name)
        if (kernel.name in wanted or kernel.key in wanted if wanted else kernel.name != REFERENCE)
        and target.kind in kernel.devices
        and kernel.missing() is None
    ]


def _refusal(kernel: Kernel, workload: Workload, target: Target) -> str | None:
    """Why an installed kernel does not run the workload, if so: a kernel's forward alone is of no use in training."""
    parts = phases(workload, workload.phase != "decode")
    return next((reason for part in parts if (reason := kernel.supports(part, target.limits)) is not None), None)


def _short(workload: Workload) -> str:
    pairs = [*workload.shape.items(), *workload.options.items()]
    return f"{workload.phase} {workload.dtype} {' '.join(f'{name}={value}' for name, value in pairs)}"
