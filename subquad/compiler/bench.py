"""How fast the kernels of an operator are as lengths grow, beside the least time that the device allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import subquad_kernels.operators  # noqa: F401  (registers the torch operators)
from subquad.cache import user_cache
from subquad.compiler.choose import REFERENCE
from subquad.compiler.compile_ahead import compile_ahead
from subquad.compiler.measure_kernels import THOROUGH, Measurer, added_bytes
from subquad.compiler.target import require_local, resolve_target
from subquad.compiler.workload import cost_row, phases
from subquad.errors import ConfigError, NotFoundError, suggestion
from subquad.registry import load_registry
from subquad.schema import BenchConfig
from subquad_cost_model import Measurement, lower_bound_s, time_rivals
from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.self_check import VerdictStore
from subquad_kernels.workload import DType, Workload

LENGTHS = {"cpu": 4, "cuda": 6}
"""How many lengths a series has, each twice the one before."""
BUDGET_S = 20.0
"""For all kernels of one length in one direction; slow ones are then timed by fewer calls."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel at one length: seconds, or the reason why it was left out.

    `forward_s` and `backward_s` are of the kernel alone, `called_s` of a forward and backward through the operator and
    autograd, on the wall; `spread` is half of slowest minus fastest round over their median, the larger of both
    directions; `peak_bytes` is what the call needs beyond its inputs (0: not observed); `error` the largest of the
    self-check.
    """

    kernel: str
    forward_s: float = math.nan
    backward_s: float = math.nan
    called_s: float = math.nan
    spread: float = 0.0
    peak_bytes: int = 0
    error: float | None = None
    why_not: str | None = None

    @property
    def both_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True, kw_only=True)
class Case:
    """All kernels at one length; `floor_s` is the bound of forward and backward on the device."""

    workload: Workload
    floor_s: float
    rows: tuple[Row, ...]

    @property
    def best_s(self) -> float:
        """Forward and backward of the fastest kernel; NaN if none ran."""
        return min((row.both_s for row in self.rows if row.why_not is None), default=math.nan)


class Bench:
    """What a request asks for, found and checked.  Raises: ConfigError, NotFoundError."""

    def __init__(self, request: BenchConfig) -> None:
        load_registry()  # fills the catalogue
        self.operator = _operator(request.operator)
        self.target = require_local(resolve_target(request.target), request.target, verb="bench")
        self.kernels = _kernels(self.operator, request.kernels)
        self.workloads = bench_workloads(self.operator, self.target.kind, request)
        folder = user_cache("verdicts")
        self._verdicts = VerdictStore(None if folder is None else folder / "verdicts.jsonl")

    @property
    def device(self) -> str:
        """The torch name of the target."""
        return cast(str, self.target.local)

    @property
    def record(self) -> Path | None:
        """The file that measurements are appended to."""
        return Measurer(self.target, BUDGET_S).store.path

    def cases(self) -> Iterator[Case]:
        """Check and time every kernel at every length; measurements go to the user's cache, for choosing as well."""
        compile_ahead(
            ((kernel, phases(workload, True)[-1]) for workload in self.workloads for kernel in self._able(workload)),
            self.device,
            self._verdicts,
        )
        for workload in self.workloads:
            yield self._case(workload)
            if self.target.kind == "cuda":
                torch.cuda.empty_cache()

    def _able(self, workload: Workload) -> list[Kernel]:
        return [kernel for kernel in self.kernels if self._refusal(kernel, workload) is None]

    def _refusal(self, kernel: Kernel, workload: Workload) -> str | None:
        refusals = (kernel.refusal(part, self.target.limits) for part in phases(workload, True))
        return next((reason for reason in refusals if reason is not None), None)

    def _case(self, workload: Workload) -> Case:
        forward, backward = phases(workload, True)
        rows: dict[str, Row] = {}
        for kernel in self.kernels:
            reason, error = self._refusal(kernel, workload), None
            if reason is None:
                verdict = self._verdicts.check(kernel, backward, self.device)
                error = max(verdict.errors.values(), default=None)
                reason = None if verdict.passed else f"failed its self-check: {verdict.reason}"
            if reason is None:
                probe = Measurer(self.target, BUDGET_S)
                failures = (probe.failure(self.operator, kernel, part) for part in (forward, backward))
                failure = next((text for text in failures if text is not None), None)
                reason = None if failure is None else f"failed at this size: {failure}"
            rows[kernel.name] = Row(kernel=kernel.name, error=error, why_not=reason)
        left = [kernel for kernel in self.kernels if rows[kernel.name].why_not is None]
        for name, found in self._measured(left, forward).items():
            rows[name] = replace(rows[name], forward_s=found.median_s, spread=_spread(found))
        for name, found in self._measured(left, backward).items():
            spread = max(rows[name].spread, _spread(found))
            rows[name] = replace(rows[name], backward_s=found.median_s, spread=spread)
        for name, row in self._called({kernel.name: rows[kernel.name] for kernel in left}, workload).items():
            rows[name] = row
        floor_s = sum(
            lower_bound_s(cost_row(self.operator, self.kernels[0], part), self.target.device)
            for part in (forward, backward)
        )
        return Case(workload=workload, floor_s=floor_s, rows=tuple(rows.values()))

    def _measured(self, kernels: Sequence[Kernel], workload: Workload) -> dict[str, Measurement]:
        """The measurement of each kernel, out of the record that it was added to."""
        measurer = Measurer(self.target, BUDGET_S, THOROUGH)
        try:
            if kernels:
                measurer.measure(self.operator, kernels, workload)
        except torch.OutOfMemoryError:  # rivals that take turns hold their inputs at the same time
            for kernel in kernels:
                measurer.measure(self.operator, [kernel], workload)
        found = {
            kernel.name: measurer.store.find(cost_row(self.operator, kernel, workload), self.target.device)
            for kernel in kernels
        }
        return {name: measurement for name, measurement in found.items() if measurement is not None}

    def _called(self, rows: Mapping[str, Row], workload: Workload) -> dict[str, Row]:
        """The rows with seconds on the wall and bytes of a forward and backward as training makes it."""
        arguments = self.operator.torch_half.sample_inputs(workload, seed=0, device=self.device)
        done, calls = dict(rows), {}
        for name, row in rows.items():
            call = partial(_train, self.operator, name, arguments)
            try:
                call()  # what it sets up once is no memory of a call
                done[name] = replace(row, peak_bytes=added_bytes(call, self.device))
                calls[name] = call
            except Exception as error:  # such as memory, which a call through autograd holds longer
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                done[name] = replace(row, why_not=f"failed when called: {reason}")
        timings = time_rivals(
            calls,
            synchronize=torch.cuda.synchronize if self.target.kind == "cuda" else None,
            min_s=THOROUGH.min_s,
            repeats=THOROUGH.repeats,
            budget_s=BUDGET_S,
        )
        return done | {name: replace(done[name], called_s=timings[name].median_s) for name in calls}


def bench_workloads(operator: Operator, kind: str, request: BenchConfig) -> list[Workload]:
    """The forward workloads of a request: the operator's series on this kind of device, or the shapes it names.

    An axis that a shape leaves out is as in the series; `s` follows `t`, and a packed sequence has batch 1.
    Raises: ConfigError.
    """
    if operator.examples and not operator.takes_sequences:
        raise ConfigError(
            what=f"{operator.name} takes one token behind a carry, and no sequences whose length could double",
            where=f"operator={operator.name}",
            mend="time decoding with whole models: bench models=[transformer]",
        )
    smallest = operator.benchmarks.get(kind) or next(iter(operator.examples), None)
    if smallest is None:
        raise ConfigError(
            what=f"{operator.name} declares neither benchmarks nor examples",
            where=f"operator={operator.name}",
            mend="add `benchmarks` to its Operator record",
        )
    _check_keys("options", request.options, smallest.options)
    dtype = smallest.dtype if request.dtype == "auto" else request.dtype
    _check_keys("dtype", [dtype], operator.tolerances)
    base = replace(smallest, dtype=cast(DType, dtype), options={**smallest.options, **request.options}, phase="forward")
    changes: list[dict[str, int]] = request.shapes or [
        {"t": base.shape["t"] * 2**doubling} for doubling in range(LENGTHS[kind])
    ]
    for change in changes:
        _check_keys("shapes", change, [*base.shape, "documents"])
        for axis, length in change.items():
            if length < (0 if axis == "m" else 1):
                raise ConfigError(what=f"{axis} is {length}", where="bench.shapes", mend="use 1 or more")
    return [replace(base, shape=_shape(base.shape, change)) for change in changes]


def _spread(measurement: Measurement) -> float:
    return (measurement.high_s - measurement.low_s) / 2 / measurement.median_s


def _shape(shape: Mapping[str, int], change: Mapping[str, int]) -> dict[str, int]:
    follows = {"s": change["t"]} if "t" in change and "s" in shape else {}
    return {**shape, **follows, **({"b": 1} if "documents" in change else {}), **change}


def _train(operator: Operator, kernel: str, arguments: Mapping[str, Any]) -> object:
    """A forward and backward through the torch operator; the gradient is that of the first output, as in training."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    op: Callable[..., Any] = getattr(torch.ops.subquad, operator.name)
    results = op(**{**arguments, **leaves}, kernel=kernel)
    first = results[0] if isinstance(results, tuple) else results
    return torch.autograd.grad(first, list(leaves.values()), first.detach(), allow_unused=True)


def _operator(name: str) -> Operator:
    names = [operator.name for operator in CATALOGUE]
    if name not in names:
        raise NotFoundError(
            what=f"no operator is called '{name}'",
            where="bench.operator",
            mend=f"{suggestion(name, names)}there are {', '.join(names)}",
        )
    return CATALOGUE.operator(name)


def _kernels(operator: Operator, names: Sequence[str]) -> list[Kernel]:
    known = {kernel.name: kernel for kernel in CATALOGUE.kernels(operator.name)}
    for name in names:
        if name not in known:
            raise NotFoundError(
                what=f"{operator.name} has no kernel called '{name}'",
                where="bench.kernels",
                mend=f"{suggestion(name, known)}there are {', '.join(known)}",
            )
    return [known[name] for name in names or known if names or name != REFERENCE]


def _check_keys(where: str, given: Sequence[str] | Mapping[str, object], known: object) -> None:
    names = list(cast(Mapping[str, object], known))
    for key in given:
        if key not in names:
            raise ConfigError(
                what=f"'{key}' is not known here",
                where=f"bench.{where}",
                mend=f"{suggestion(key, names)}there are {', '.join(names)}",
            )
